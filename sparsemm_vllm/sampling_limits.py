"""Lists in sampling parameters that are longer than a worker's memory for them.

vLLM's workers raise an exception for them, which ends the engine, and its front ends do not refuse
all of them (0.33).
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

NEVER_TOO_LONG = 128  # the smallest of the limits


class _List(NamedTuple):
    name: str
    length: Callable[[Any], int]
    most: Callable[[], int]
    without: dict[str, Any]


def _logit_bias(name: str) -> Callable[[], int]:
    def most() -> int:
        from vllm.v1.worker.gpu.sample import logit_bias  # of the workers: not imported for nothing

        return getattr(logit_bias, name)

    return most


def _env(name: str) -> Callable[[], int]:
    def most() -> int:
        from vllm import envs

        return getattr(envs, name)

    return most


_LISTS = (
    _List(
        "logit_bias",
        lambda params: len(params.logit_bias or ()),
        _logit_bias("MAX_NUM_LOGIT_BIAS_TOKENS"),
        {"logit_bias": None},
    ),
    _List(
        "allowed_token_ids",
        lambda params: len(params.allowed_token_ids or ()),
        _logit_bias("MAX_NUM_ALLOWED_TOKEN_IDS"),
        {"allowed_token_ids": None},
    ),
    _List(
        "stop_token_ids (with min_tokens)",
        lambda params: len(params.all_stop_token_ids) if params.min_tokens > 0 else 0,
        _logit_bias("MAX_NUM_STOP_TOKEN_IDS"),
        {"min_tokens": 0},
    ),
    _List(
        "bad_words",
        lambda params: len(params.bad_words_token_ids or ()),
        _env("VLLM_MAX_NUM_BAD_WORDS"),
        {"_bad_words_token_ids": None},
    ),
    _List(
        "bad_words, in tokens",
        lambda params: sum(map(len, params.bad_words_token_ids or ())),
        _env("VLLM_MAX_BAD_WORDS_TOTAL_TOKENS"),
        {"_bad_words_token_ids": None},
    ),
)


def _too_long(params: Any) -> list[tuple[_List, int, int]]:
    lengths = [(each, each.length(params)) for each in _LISTS]
    long = [(each, length, each.most()) for each, length in lengths if length > NEVER_TOO_LONG]
    return [(each, length, most) for each, length, most in long if length > most]


def too_long(params: Any) -> str | None:
    """Which lists of sampling parameters are too long for a worker, if any."""
    found = [
        f"{each.name}: {length:,}, at most {most:,}" for each, length, most in _too_long(params)
    ]
    return f"too many entries: {'; '.join(found)}" if found else None


def without_too_long(params: Any) -> Any:
    """A copy of sampling parameters that a worker takes, without the lists that are too long."""
    params = copy(params)
    for each, _, _ in _too_long(params):
        for name, value in each.without.items():
            setattr(params, name, value)
    return params
