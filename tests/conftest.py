"""Tests never reach the network, and need no GPU where there is none."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from sparsemm_vllm import environment
from support.paths import GOLDEN

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: more threads only wait for each other
torch.set_num_threads(1)
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM would want a NUMA node for each worker
if not environment.has_gpu():
    environment.use_cpu()

# Others may take CPU time too. The usual run tries the same examples each time, so that it fails
# for a change and not by chance; `make slow` tries new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("new", deadline=None)
hypothesis.settings.load_profile("same")


# Files of half a minute and more, the longest first.
LONG = (
    "test_hostile", "test_engine_kernels", "test_soak", "test_demo", "test_kernel_report",
    "test_serve", "test_check_run", "test_broken_workers", "test_evaluate", "test_gpu_suite",
    "test_gpu_run", "test_processes", "test_parallel", "test_window_scores",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process has one left when the other is done."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_products() -> None:
    if not environment.has_gpu():
        from kernel_cases import repair_bfloat16_products

        repair_bfloat16_products()


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts what runs in the background with SIGINT ignored; children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SPARSEMM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with random weights; some files have models of their own."""
    from support.tiny import make_llava

    return make_llava(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="session")
def published() -> tuple[torch.Tensor, Any]:
    """The published head scores of LLaVA-NeXT-Vicuna-7B ``[32, 32]``, and budgets made of them."""
    if not GOLDEN.is_dir():
        pytest.skip("golden data is not beside this checkout")
    by_head = json.loads((GOLDEN / "llava-next-vicuna-7b.head_scores.json").read_text())
    scores = np.zeros((32, 32))
    for name, values in by_head.items():
        layer, head = map(int, name.split("-"))
        scores[layer, head] = np.mean(values)
    return torch.from_numpy(scores), np.load(GOLDEN / "head_budgets.npz")
