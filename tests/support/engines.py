"""vLLM engines in this process, shared between tests, and a way to watch one step by step."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from vllm.distributed import parallel_state

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check import engine as check_run
from sparsemm_vllm.commands.check.engine import Answer
from sparsemm_vllm.commands.check.engine import ask as ask
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.worker.probes.kept import load_kept
from sparsemm_vllm.engine.worker.state import SparseState
from support.tiny import skewed_profile

BLOCK = 16
WINDOW = 8
HELLO = "<s><image>hello world this is a long prompt"
DIGITS = "<s><image><image>Another one here of longer text 0123456789 ABCDEF"


class Engine(check_run.Engine):
    """An engine with its scheduler within reach."""

    def __init__(self, model: Path, settings: dict[str, Any] | None, **options: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        super().__init__(model, settings, **options)
        self.core = self.llm.llm_engine.engine_core.engine_core

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

    def rest(self) -> None:
        """Check that no request left a block behind, and forget all of them."""
        assert self.all_free(), "the engine is idle but holds blocks"
        self.forget()

    def generate(
        self, *prompts: dict[str, Any], chunk: int | None = None, **options: Any
    ) -> list[Answer]:
        """Answer all prompts at once.

        Args:
            prompts: prompts, from `ask`.
            chunk: tokens a step may compute, for this call.
            options: arguments of the base class's method.
        """
        scheduler = self.scheduler
        usual = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = chunk or usual
        try:
            return super().generate(*prompts, **options)
        finally:
            scheduler.max_num_scheduled_tokens = usual

    def kept(self, answer: Answer) -> dict[tuple[int, int], np.ndarray]:
        """What each head kept of a request's prompt."""
        assert self.settings is not None
        return load_kept(Path(self.settings["record_kept"]), answer.request_id)


def share_expert_group() -> None:
    """Let an engine with experts follow others in this process.

    vLLM makes a process's groups once: after an engine without experts there is none for them. The
    one of tensor parallelism has the same single rank.
    """
    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        parallel_state._EP = parallel_state.get_tp_group()


def settings(budget: int, folder: Path | None = None, **options: Any) -> dict[str, Any]:
    """Settings with unequal heads and a small window."""
    values: dict[str, Any] = {
        "budget": budget,
        "window": WINDOW,
        "profile": skewed_profile().model_dump(mode="json"),
        "poison_freed": True,
    }
    if folder is not None:
        values["record_kept"] = str(folder)
    return values | options


def serve_options(settings: dict[str, Any], **changes: str) -> list[str]:
    """Arguments of `vllm serve` for a tiny model.

    Args:
        settings: settings of SPARSEMM.
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
