"""vLLM engines in this process, shared between tests, and a way to watch one step by step."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tiny import picture, skewed_profile

from sparsemm_vllm.kv_cache import SparseMMManager
from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.recording import load_kept
from sparsemm_vllm.step import SparseState

BLOCK = 16
WINDOW = 8
HELLO = "<s><image>hello world this is a long prompt"
DIGITS = "<s><image><image>Another one here of longer text 0123456789 ABCDEF"


@dataclass(frozen=True)
class Answer:
    """What an engine said to a prompt."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


def ask(text: str, *seeds: int) -> dict[str, Any]:
    """A prompt with a noise picture for each ``<image>``."""
    prompt: dict[str, Any] = {"prompt": text}
    if seeds:
        pictures = [picture(seed) for seed in seeds]
        prompt["multi_modal_data"] = {"image": pictures if len(pictures) > 1 else pictures[0]}
    return prompt


class Engine:
    """An in-process `vllm.LLM`, greedy, with its scheduler within reach."""

    # All share one process group, which the first engine to be deleted would close.
    _alive: ClassVar[list[Any]] = []

    def __init__(self, model: Path, settings: dict[str, Any] | None, **options: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
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
        self.llm = LLM(model=str(model), **(defaults | options))
        self._alive.append(self.llm)
        self.core = self.llm.llm_engine.engine_core.engine_core  # type: ignore[union-attr]

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def manager(self) -> SparseMMManager:
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        (manager,) = (m for m in managers if isinstance(m, SparseMMManager))
        return manager

    @property
    def layout(self) -> CacheLayout:
        return self.manager.layout

    @property
    def state(self) -> SparseState:
        """The worker's."""
        return self.core.model_executor.driver_worker.worker.model_runner.model_state._state

    def use(self, layout: CacheLayout) -> None:
        """Prune by other budgets from now on, while no request is running."""
        self.rest()
        self.manager.layout = self.state.layout = layout

    def all_free(self) -> bool:
        """Whether every block but the null block is in the pool."""
        return self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1

    def held(self, request_id: str) -> int:
        """Blocks that a request holds."""
        return sum(not block.is_null for block in self.manager.req_to_blocks[request_id])

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def rest(self) -> None:
        """Check that no request left a block behind, and forget all of them."""
        assert self.all_free(), "the engine is idle but holds blocks"
        self.forget()

    def generate(
        self,
        *prompts: dict[str, Any],
        max_tokens: int = 12,
        chunk: int | None = None,
        watch: Callable[[], None] | None = None,
        options: Sequence[dict[str, Any]] | None = None,
        extra_args: dict[str, Any] | list[dict[str, Any] | None] | None = None,
    ) -> list[Answer]:
        """Answer all prompts at once.

        Args:
            prompts: from `ask`.
            max_tokens: to generate.
            chunk: tokens a step may compute, for this call.
            watch: called after every step.
            options: of each request, for `LLMEngine.add_request`.
            extra_args: of the sampling parameters, of all prompts or of each.
        """
        from vllm import SamplingParams

        each = extra_args if isinstance(extra_args, list) else [extra_args] * len(prompts)
        params = [
            SamplingParams(
                max_tokens=max_tokens, temperature=0, logprobs=2, ignore_eos=True, extra_args=asked
            )
            for asked in each
        ]
        engine, scheduler = self.llm.llm_engine, self.scheduler
        usual = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = chunk or usual
        first = getattr(self, "_asked", 0)
        self._asked = first + len(prompts)
        ids = [f"request-{first + i}" for i in range(len(prompts))]
        outputs: dict[str, Any] = {}
        try:
            for request_id, prompt, own, rest in zip(
                ids, prompts, params, options or [{}] * len(prompts), strict=True
            ):
                engine.add_request(request_id, prompt, own, **rest)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    outputs[output.request_id] = output
                if watch is not None:
                    watch()
        finally:
            scheduler.max_num_scheduled_tokens = usual
        return [self._answer(outputs[request_id]) for request_id in ids]

    @staticmethod
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

    def kept(self, answer: Answer) -> dict[tuple[int, int], np.ndarray]:
        """What each head kept of a request's prompt."""
        assert self.settings is not None
        return load_kept(Path(self.settings["record_kept"]), answer.request_id)


def settings(budget: int, folder: Path | None = None, **options: Any) -> dict[str, Any]:
    """Settings with unequal heads and a small window."""
    values: dict[str, Any] = {
        "budget": budget,
        "window": WINDOW,
        "profile": skewed_profile().model_dump(mode="json"),
    }
    if folder is not None:
        values["record_kept"] = str(folder)
    return values | options


def serve_options(settings: dict[str, Any], **changes: str) -> list[str]:
    """Arguments of `vllm serve` for a tiny model.

    Args:
        settings: SPARSEMM's.
        changes: further options, or other values, by their names with underscores.
    """
    options = {
        "attention_backend": "SPARSEMM",
        "served_model_name": "tiny",
        "dtype": "float32",
        "max_model_len": "512",
        "max_num_seqs": "4",
        "kv_cache_memory_bytes": str(64 << 20),
        "additional_config": json.dumps({"sparsemm": settings}),
    }
    pairs = (options | changes).items()
    words = [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]
    return [*words, "--enforce-eager"]


def assert_same(a: Answer, b: Answer, tolerance: float = 1e-4) -> None:
    """Equal tokens and log-probabilities."""
    assert a.tokens == b.tokens
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)


def assert_close(a: Answer, b: Answer, tolerance: float = 5e-2) -> None:
    """Equal as far as rounding lets it be: until `b` was unsure of its own next token."""
    unsure = next((i for i, gap in enumerate(b.gaps) if gap < tolerance), len(b.gaps))
    assert unsure > 0
    assert a.tokens[:unsure] == b.tokens[:unsure]
    np.testing.assert_allclose(a.logprobs[:unsure], b.logprobs[:unsure], atol=tolerance)


def assert_same_kept(
    a: dict[tuple[int, int], np.ndarray], b: dict[tuple[int, int], np.ndarray]
) -> None:
    """Equal kept sets of all heads."""
    assert a.keys() == b.keys()
    for head, positions in a.items():
        np.testing.assert_array_equal(positions, b[head], err_msg=f"head {head}")
