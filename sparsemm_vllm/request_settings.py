"""What one request may ask for: ``vllm_xargs`` of the OpenAI API, ``SamplingParams.extra_args``.

The front end checks it, so that nothing wrong reaches the engine; scheduler and workers make the
same cache layout of it, each by itself.
"""

import difflib
from copy import copy
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sparsemm_vllm.attention_record import RECORD
from sparsemm_vllm.knockout import KNOCKOUT
from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.methods import METHODS
from sparsemm_vllm.profile import first_error
from sparsemm_vllm.settings import Settings

PREFIX = "sparsemm"
PRUNE, BUDGET = "sparsemm", "sparsemm_budget"
LEFT_DENSE = "sparsemm_left_dense"  # the scheduler's word to the workers; no request may say it


class RequestError(ValueError):
    """A request asks for something that does not exist, or that it cannot have."""


class RequestSettings(BaseModel):
    """The keys that begin with `sparsemm`.

    Attributes:
        sparsemm: 0 keeps the prompt whole.
        sparsemm_budget: tokens per KV head on average, window included, in place of the server's.
        sparsemm_record: see `AttentionRecorder`; of engines that record attention.
        sparsemm_knockout: see `Knockouts`; of engines that record attention.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sparsemm: int = Field(default=1, ge=0, le=1)
    sparsemm_budget: int | None = None
    sparsemm_record: list[int] | None = None
    sparsemm_knockout: list[int] | None = None

    @field_validator("sparsemm", mode="before")
    @classmethod
    def _bool_is_int(cls, value: Any) -> Any:
        return int(value) if isinstance(value, bool) else value


def asks_for_us(extra_args: dict[str, Any] | None) -> bool:
    """Whether a request has keys that only SPARSEMM could mean."""
    return any(str(key).lower().startswith(PREFIX) for key in extra_args or ())


def check_request(extra_args: dict[str, Any], settings: Settings) -> None:
    """Refuse what the server cannot do.

    Args:
        extra_args: of a request's sampling parameters.
        settings: of the server.

    Raises:
        RequestError: one line that names the key and says what it may be.
    """
    asked = {key: value for key, value in extra_args.items() if asks_for_us({key: value})}
    for key in asked:
        if key not in RequestSettings.model_fields:
            near = difflib.get_close_matches(key.lower(), (PRUNE, BUDGET), n=1, cutoff=0.0)
            raise RequestError(f"unknown request setting {key!a}; did you mean '{near[0]}'?")
    try:
        request = RequestSettings.model_validate(asked)
    except ValidationError as error:
        raise RequestError(f"request setting {first_error(error)}") from None
    for key in {RECORD, KNOCKOUT} & asked.keys():
        if not settings.record_attention:
            raise RequestError(f"request setting {key}: this server records no attention")
    if request.sparsemm_budget is not None:
        _check_budget(request, settings)


def _check_budget(request: RequestSettings, settings: Settings) -> None:
    budget = request.sparsemm_budget
    assert budget is not None
    if not settings.window < budget <= settings.largest_budget:
        raise RequestError(
            f"request setting {BUDGET}: {budget} tokens; this server takes {settings.window + 1} "
            f"to {settings.largest_budget} (its window and max_request_budget)"
        )
    if not request.sparsemm:
        raise RequestError(f"request setting {BUDGET}: '{PRUNE}' is 0, so nothing is pruned")
    if not METHODS[settings.method].prunes:
        raise RequestError(f"request setting {BUDGET}: this server prunes nothing (method full)")


def leave_dense(params: Any, left_dense: bool) -> Any:
    """Sampling parameters with the scheduler's decision in them, which travels to the workers.

    A copy if they change: the samples of one prompt may share theirs.
    """
    extra_args = params.extra_args or {}
    if extra_args.get(LEFT_DENSE, False) == left_dense:
        return params
    params = copy(params)
    params.extra_args = extra_args | {LEFT_DENSE: left_dense}
    return params


def request_layout(layout: CacheLayout, extra_args: dict[str, Any] | None) -> CacheLayout:
    """The cache layout of a request that `check_request` let pass, on scheduler and workers.

    Args:
        layout: the server's.
        extra_args: of the request's sampling parameters.
    """
    if not extra_args:
        return layout
    if extra_args.get(LEFT_DENSE) or not extra_args.get(PRUNE, 1):
        return layout.dense
    budget = extra_args.get(BUDGET)
    return layout if budget is None else layout.of_budget(budget)
