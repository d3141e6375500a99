"""A vLLM engine in this process that answers greedily, through public methods of vLLM only.

vLLM is imported in functions: it takes seconds, and reads an environment that is set before.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sparsemm_vllm.commands.check.model import picture


class EngineError(RuntimeError):
    """The engine does not do what a check needs of it."""


@dataclass(frozen=True)
class Answer:
    """What an engine said to a prompt.

    Attributes:
        request_id: name of the request.
        prompt_tokens: length `n` of the prompt, pictures included.
        cached_tokens: prompt tokens that came from the prefix cache.
        tokens: token ids of the answer.
        logprobs: log-probability of each of them.
        gaps: difference between the two best log-probabilities at each of them.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


def ask(text: str, *seeds: int) -> dict[str, Any]:
    """A prompt for vLLM, with a noise picture for each ``<image>``."""
    prompt: dict[str, Any] = {"prompt": text}
    if seeds:
        pictures = [picture(seed) for seed in seeds]
        prompt["multi_modal_data"] = {"image": pictures if len(pictures) > 1 else pictures[0]}
    return prompt


class Engine:
    """A `vllm.LLM` in this process, if VLLM_ENABLE_V1_MULTIPROCESSING is 0.

    Args:
        model: folder of the model.
        settings: settings of SPARSEMM; none for dense attention.
        options: options of `vllm.LLM`, which win over the defaults here.
    """

    # All share one process group, which the first engine to be deleted would close.
    _alive: ClassVar[list[Any]] = []

    def __init__(self, model: Path, settings: dict[str, Any] | None, **options: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1024,
            "seed": 0,
        }
        if settings is not None:
            defaults["attention_backend"] = "SPARSEMM"
            defaults["additional_config"] = {"sparsemm": settings}
        self.settings = settings
        self._asked = 0
        self.llm = LLM(model=str(model), **(defaults | options))
        self._alive.append(self.llm)

    def forget(self) -> None:
        """Empty the prefix cache.

        Raises:
            EngineError: if vLLM cannot: a request still holds blocks.
        """
        if not self.llm.reset_prefix_cache():
            raise EngineError("the prefix cache could not be emptied: blocks are still in use")

    def generate(
        self,
        *prompts: dict[str, Any],
        max_tokens: int = 12,
        watch: Callable[[], None] | None = None,
        options: Sequence[dict[str, Any]] | None = None,
        extra_args: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
        patience: float = math.inf,
    ) -> list[Answer]:
        """Answer all prompts at once.

        Args:
            prompts: prompts, from `ask`.
            max_tokens: tokens to generate for each.
            watch: function to call after every step.
            options: arguments of `LLMEngine.add_request`, of each prompt.
            extra_args: value of `SamplingParams.extra_args`, for all prompts or for each.
            patience: seconds until answers must be complete.

        Raises:
            EngineError: if they are not: a request is never scheduled, say.
        """
        from vllm import SamplingParams

        each = extra_args
        if each is None or isinstance(each, dict):
            each = [each] * len(prompts)
        params = [
            SamplingParams(
                max_tokens=max_tokens, temperature=0, logprobs=2, ignore_eos=True, extra_args=asked
            )
            for asked in each
        ]
        engine = self.llm.llm_engine
        ids = [f"request-{self._asked + i}" for i in range(len(prompts))]
        self._asked += len(prompts)
        for request_id, prompt, own, rest in zip(
            ids, prompts, params, options or [{}] * len(prompts), strict=True
        ):
            engine.add_request(request_id, prompt, own, **rest)
        outputs: dict[str, Any] = {}
        deadline = time.monotonic() + patience
        while engine.has_unfinished_requests():
            if time.monotonic() > deadline:
                raise EngineError(f"no complete answer after {patience:.0f} s")
            for output in engine.step():
                outputs[output.request_id] = output
            if watch is not None:
                watch()
        return [_answer(outputs[request_id]) for request_id in ids]


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    steps = completion.logprobs
    ranked = [sorted((p.logprob for p in step.values()), reverse=True) for step in steps]
    return Answer(
        request_id=output.request_id,
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens,
        tokens=tokens,
        logprobs=[step[token].logprob for step, token in zip(steps, tokens, strict=True)],
        gaps=[best[0] - best[1] for best in ranked],
    )
