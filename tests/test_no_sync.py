"""`forward` must not wait for the device: no operation whose result the host has to see."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.sparse_attention import attend_pruned, prune
from sparsemm_vllm.step import PrunedCache, RequestTable, correct_slots, plan_step

L, HKV, G, D, P, WINDOW = 2, 3, 2, 16, 8, 4

# What reads a value, or makes a shape from values, on the device.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class NoWaiting(TorchDispatchMode):
    """Raises where CUDA would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"aten::{name} waits for the device")
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"aten::{name} with a mask waits for the device"
        if name == "repeat_interleave":
            size = (kwargs or {}).get("output_size")
            assert size is not None, "repeat_interleave waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero])
def test_the_mode_sees_waiting(waits: Any) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError), NoWaiting():
        waits(x)


def test_prune_and_decode_do_not_wait() -> None:
    layout = CacheLayout(
        capacities=((0, 1, 40), (8, 9, 3)), window=WINDOW, base=10, pool_kernel=3
    )  # fmt: skip
    cache = torch.randn(L, 40, HKV, P, 2 * D)
    layers = {"layers.0": 0, "layers.1": 1}
    own = layout.slice_of(0, 0)
    table = RequestTable(PrunedCache(cache, layers, layout, own), max_num_reqs=4)
    n, generated = 61, 3
    table.add(0, n)
    blocks = torch.arange(1, 33)[None]

    query = torch.randn(n, HKV * G, D)
    prefill = plan_step(table, np.array([0]), np.array([n]), np.array([0, n]), np.array([n]))
    decode = plan_step(
        table, np.array([0]), np.array([n]), np.array([0, 1]), np.array([n + generated])
    )
    assert prefill.prunes
    assert decode.decodes
    slots, positions = torch.zeros(1, dtype=torch.int64), torch.tensor([n + generated - 1])
    seq_lens, output = torch.tensor([n + generated]), torch.empty(1, HKV * G, D)
    with NoWaiting():
        for layer in layers:
            prune(prefill, layer, query, blocks, 0.25)
        correct_slots(decode, slots, positions, blocks)
        for layer in layers:
            attend_pruned(decode, layer, query[:1], output, blocks, seq_lens, 0.25)
    assert output.isfinite().all()
