"""What differs between the supported releases of vLLM: the one place that knows.

Which way is taken depends on what a function of the installed vLLM takes, never on a version
number. What only has more parameters in a newer release needs no entry here: our functions pass on
whatever they are given.
"""

import inspect
from collections.abc import Callable
from typing import Any

from vllm.outputs import RequestError

HIT_LIMIT = "max_cache_hit_length"


def bounded_lookup(get_computed_blocks: Callable[..., Any]) -> Callable[..., Any]:
    """The prefix lookup of `KVCacheManager`, with a bound on the hit's tokens before its arguments.

    0.33 takes such a bound. 0.32 does not, and lets a hit end one token before the request does: it
    is shown a request that seems shorter.

    Args:
        get_computed_blocks: vLLM's method, `self` first.
    """
    signature = inspect.signature(get_computed_blocks)
    if HIT_LIMIT in signature.parameters:

        def look_up(limit: int, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            asked = bound.arguments.get(HIT_LIMIT)
            most = bound.arguments["request"].num_tokens - 1 if asked is None else asked
            bound.arguments[HIT_LIMIT] = min(limit, most)
            return get_computed_blocks(*bound.args, **bound.kwargs)

    else:

        def look_up(limit: int, *args: Any, **kwargs: Any) -> Any:
            manager, request, *rest = args
            shown = _Shorter(request, min(request.num_tokens, limit + 1))
            return get_computed_blocks(manager, shown, *rest, **kwargs)

    return look_up


def end_with_error(scheduler: Any, request_id: str, message: str) -> None:
    """Let the scheduler end a request when it processes its next step.

    Since 0.33 the client is told why. Before it only gets an error.

    Args:
        scheduler: scheduler of the engine.
        request_id: id of a request that is not finished.
        message: sentence for the client.
    """
    failed = scheduler.grammar_compile_error_reqs
    if isinstance(failed, set):
        failed.add(request_id)
        return
    failed[request_id] = RequestError(code="internal_error", message=message)


class _Shorter:
    """A request that seems to have `num_tokens`."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
