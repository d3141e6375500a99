"""The spec of pruned layers exists only where SPARSEMM is installed."""

import pickle

import pytest
import torch

from sparsemm_vllm import plugin
from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.vllm_api import contract
from sparsemm_vllm.engine.vllm_api.compatibility import IncompatibleError
from sparsemm_vllm.engine.vllm_api.hooks import CHUNK_END
from support.children import python

# A process that got a spec as the scheduler gets it, and asks vLLM for its manager.
RECEIVER = """
import pickle, sys
import sparsemm_vllm
sparsemm_vllm.use_cpu()
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from sparsemm_vllm import plugin
from sparsemm_vllm.engine.vllm_api.compatibility import IncompatibleError

def manager():
    return KVCacheSpecRegistry.get_manager_class(pickle.loads(bytes.fromhex(sys.argv[1])))

try:
    print("not installed:", manager().__name__)
except IncompatibleError as error:
    print("refused:", error)
plugin.install()
print("installed:", manager().__name__)
"""


@pytest.fixture(autouse=True)
def installed() -> None:
    plugin.install()


def make_spec() -> SparseMMSpec:
    layout = CacheLayout(((3, 98), (0, 16)), window=8, base=16)
    return SparseMMSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, layout=layout
    )


def test_vllm_gets_no_dense_manager_for_a_pruned_layer() -> None:
    """Where SPARSEMM is not installed, vLLM would take the manager of the spec's base class."""
    done = python("-c", RECEIVER, pickle.dumps(make_spec()).hex())
    assert done.returncode == 0, done.stderr
    refused, installed = done.stdout.splitlines()[-2:]
    assert refused.startswith("refused: SPARSEMM is not installed in this process;")
    assert "sparsemm_vllm.plugin.install() first" in refused
    assert installed == "installed: SparseMMManager"


def test_no_spec_is_made_where_a_hook_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_spec()
    holder, name = contract.resolve(CHUNK_END.symbol)
    monkeypatch.setattr(holder, name, lambda *args: 0)
    sent = pickle.dumps(made)
    for make in (make_spec, lambda: pickle.loads(sent)):
        with pytest.raises(IncompatibleError, match="_reserve_prefill_lookahead"):
            make()


def test_a_spec_arrives_as_it_was_sent() -> None:
    made = make_spec()
    assert pickle.loads(pickle.dumps(made)) == made
