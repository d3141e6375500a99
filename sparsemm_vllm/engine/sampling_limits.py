"""Lists in sampling parameters that are longer than a worker's memory for them.

vLLM's workers raise an exception for them, which ends the engine, and its front ends do not refuse
all of them (0.33).
"""

from copy import copy
from typing import Any

from vllm import envs
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS
from vllm.v1.worker.gpu.sample.logit_bias import (
    MAX_NUM_ALLOWED_TOKEN_IDS,
    MAX_NUM_LOGIT_BIAS_TOKENS,
    MAX_NUM_STOP_TOKEN_IDS,
)


def too_long(params: Any) -> str | None:
    """Which lists of sampling parameters are too long for a worker, if any."""
    found = [f"{name}: {length:,}, at most {most:,}" for name, length, most, _ in _too_long(params)]
    return f"too many entries: {'; '.join(found)}" if found else None


def without_too_long(params: Any) -> Any:
    """A copy of sampling parameters that a worker takes, without the lists that are too long."""
    params = copy(params)
    for *_, (field, empty) in _too_long(params):
        setattr(params, field, empty)
    return params


def _too_long(params: Any) -> list[tuple[str, int, int, tuple[str, Any]]]:
    """Of each list that is too long: name, length, limit, and the field and value without it."""
    bad_words = params.bad_words_token_ids or ()
    no_bad_words = "_bad_words_token_ids", None
    lists = [
        (
            "logit_bias",
            len(params.logit_bias or ()),
            MAX_NUM_LOGIT_BIAS_TOKENS,
            ("logit_bias", None),
        ),
        (
            "allowed_token_ids",
            len(params.allowed_token_ids or ()),
            MAX_NUM_ALLOWED_TOKEN_IDS,
            ("allowed_token_ids", None),
        ),
        (
            "stop_token_ids (with min_tokens)",
            len(params.all_stop_token_ids) if params.min_tokens > 0 else 0,
            MAX_NUM_STOP_TOKEN_IDS,
            ("min_tokens", 0),
        ),
        (
            "logprob_token_ids",
            len(params.logprob_token_ids or ()),
            MAX_LOGPROB_TOKEN_IDS,
            ("logprob_token_ids", None),
        ),
        ("bad_words", len(bad_words), envs.VLLM_MAX_NUM_BAD_WORDS, no_bad_words),
        (
            "bad_words, in tokens",
            sum(map(len, bad_words)),
            envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS,
            no_bad_words,
        ),
    ]
    return [each for each in lists if each[1] > each[2]]
