"""KV caches that vLLM builds otherwise than SPARSEMM needs them: refused by the worker."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.flash_attn_diffkv import FlashAttentionDiffKVBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine import spec as layer_spec
from sparsemm_vllm.engine.attention.cuda import SparseMMBackend
from sparsemm_vllm.engine.config import Serving, UnsupportedError
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.worker import model_state
from sparsemm_vllm.engine.worker.state import PrunedCache
from sparsemm_vllm.plugin import install
from support.tiny import KV_HEADS, LAYERS, skewed_profile

P, D = 16, 32
LAYOUT = CacheLayout.from_scores(skewed_profile().tensor(), KV_HEADS, 40, 8)
SHAPE = {"block_size": P, "num_kv_heads": KV_HEADS, "head_size": D, "dtype": torch.float32}
install()
SPEC = SparseMMSpec(**SHAPE, layout=LAYOUT)
SERVING = Serving(Settings(), LAYOUT, RequestLimits.of(Settings()))


def make_config(caches: list[torch.Tensor], pruned: list[int] | None = None) -> Any:
    """A configuration whose layers have these caches."""
    kinds = [
        "full_attention" if pruned is None or i in pruned else "sliding" for i in range(LAYERS)
    ]
    layers = {f"layers.{i}": SimpleNamespace(kv_cache=cache) for i, cache in enumerate(caches)}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        cache_config=SimpleNamespace(cache_dtype="auto", num_gpu_blocks=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: LAYERS,
            get_total_num_kv_heads=lambda: KV_HEADS,
            get_head_size=lambda: D,
            hf_text_config=SimpleNamespace(layer_types=kinds),
        ),
    )


def caches(page_size: int = P) -> list[torch.Tensor]:
    """Of all layers, at equal distances in one allocation."""
    return list(torch.zeros(LAYERS, 5, KV_HEADS, page_size, 2 * D))


def attach(config: Any, *specs: Any, monkeypatch: pytest.MonkeyPatch) -> PrunedCache:
    """What the worker makes of its caches, in groups of these specs; the first has all layers."""
    monkeypatch.setattr(model_state.DefaultModelState, "initialize_kv_cache", lambda *_: None)
    state: Any = object.__new__(model_state.SparseMMModelState)
    state.vllm_config, state.device = config, torch.device("cpu")
    state._state = SimpleNamespace(heads=SimpleNamespace(L=LAYERS))
    state._state.attach = lambda cache: setattr(state._state, "cache", cache)
    state._serving = SERVING
    names = list(config.compilation_config.static_forward_context)
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=names) for spec in specs]
    state.initialize_kv_cache(SimpleNamespace(kv_cache_groups=groups, num_blocks=5), None)
    return state._state.cache


def test_equal_distances_are_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    own = caches()
    cache = attach(make_config(own), SPEC, monkeypatch=monkeypatch)
    own[2][1, 3, 4] = 7
    assert cache.tensor.shape == (LAYERS, *own[0].shape)
    assert cache.tensor[2, 1, 3, 4, 0] == 7


def test_every_sparsemm_layer_of_a_gpu_is_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that stay dense too, each with its group's block table; other backends' are not."""
    monkeypatch.setattr(model_state.DefaultModelState, "initialize_kv_cache", lambda *_: None)
    warmed: list[Any] = []
    monkeypatch.setattr(model_state, "warm_up", lambda *args: warmed.append(args))
    config = make_config(caches())
    layers = config.compilation_config.static_forward_context
    impl = SimpleNamespace(warm_up_dense=lambda *args: warmed.append(args))
    layers |= {"window.0": SimpleNamespace(), "window.1": SimpleNamespace()}
    for name, layer in layers.items():
        layer.impl = impl
        layer.get_attn_backend = lambda name=name: (
            FlashAttentionBackend if name == "window.1" else SparseMMBackend
        )
    state: Any = object.__new__(model_state.SparseMMModelState)
    state.vllm_config, state.device, state.dtype = config, torch.device("cuda"), torch.float16
    state._state = SimpleNamespace(heads=SimpleNamespace(L=LAYERS), attach=lambda cache: None)
    state._serving = SERVING
    pruned = [f"layers.{i}" for i in range(LAYERS)]
    groups = [
        SimpleNamespace(
            kv_cache_spec=FullAttentionSpec(**SHAPE), layer_names=["window.0", "window.1"]
        ),
        SimpleNamespace(kv_cache_spec=SPEC, layer_names=pruned),
    ]
    kv_cache_config = SimpleNamespace(kv_cache_groups=groups, num_blocks=5)
    state.initialize_kv_cache(kv_cache_config, SimpleNamespace(input_block_tables=["w", "p"]))
    assert warmed == [
        (state._state, torch.float16, "p"),
        (layers["window.0"], torch.float16, "w"),
        *((layers[name], torch.float16, "p") for name in pruned),
    ]


SEVERAL = [torch.zeros(5, KV_HEADS, P, 2 * D) for _ in range(LAYERS)]


@pytest.mark.parametrize(
    ("made", "specs", "reason"),
    [
        (SEVERAL, [SPEC], "head pages cannot be striped over them"),
        (caches(2 * P), [SPEC], "start vLLM with --block-size 32"),
        (caches()[:3], [SPEC], "this rank has 3 layers to prune, the layout expects 4"),
        (caches(), [SPEC, SPEC], "into 2 KV cache groups, not into one"),
        (caches(), [FullAttentionSpec(**SHAPE)], "into 0 KV cache groups, not into one"),
    ],
    ids=["allocations", "page size", "layers missing", "two groups", "no group"],
)
def test_caches(
    made: list[torch.Tensor], specs: list[Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        attach(make_config(made), *specs, monkeypatch=monkeypatch)


def test_layers_of_one_allocation_at_unequal_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    every = torch.zeros(LAYERS + 1, 5, KV_HEADS, P, 2 * D)
    with pytest.raises(UnsupportedError, match="at equal distances into one allocation"):
        attach(make_config([every[i] for i in (0, 1, 3, 4)]), SPEC, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("pruned", "shape", "sharing", "reason"),
    [
        ([0, 2], {}, None, r"the model's configuration does not say so \(layer_types\)"),
        (None, {"num_kv_heads": 2}, None, "each KV head must lie on exactly one rank"),
        (None, {}, "layers.1", "layers layers.3 share the KV cache of layers.1"),
        (None, {"head_size_v": 16}, None, "keys of 32 numbers and values of 16, the model's heads"),
        (None, {"head_size": 64}, None, "keys of 64 numbers and values of 64, the model's heads"),
    ],
    ids=["kinds of layers", "heads on several ranks", "shared caches", "values", "heads"],
)
def test_layers(pruned: Any, shape: dict[str, int], sharing: str | None, reason: str) -> None:
    config = make_config(caches(), pruned)
    context = config.compilation_config.static_forward_context
    layer = SimpleNamespace(layer_name="layers.1", attn_backend=SparseMMBackend)
    layer_spec._check_layer(layer, SPEC, make_config(caches()))
    context["layers.3"].kv_sharing_target_layer_name = sharing
    spec = FullAttentionSpec(**SHAPE | shape)
    with pytest.raises(UnsupportedError, match=reason):
        layer_spec._check_layer(layer, spec, config)


def test_layers_of_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """MiMo and openPangu choose one for values of another size than keys, whatever is asked for."""
    layer: Any = SimpleNamespace(layer_name="layers.1", attn_backend=FlashAttentionDiffKVBackend)
    window = SlidingWindowSpec(**SHAPE, sliding_window=32)
    spec = FullAttentionSpec(**SHAPE, head_size_v=16)
    config = make_config(caches())
    monkeypatch.setattr(layer_spec, "uses_sparsemm", lambda _: True)
    assert layer_spec.sparse_spec(layer, window, config) is window
    with pytest.raises(UnsupportedError, match="with FLASH_ATTN_DIFFKV, which the model"):
        layer_spec.sparse_spec(layer, spec, config)
    monkeypatch.setattr(layer_spec, "uses_sparsemm", lambda _: False)
    assert layer_spec.sparse_spec(layer, spec, config) is spec


def test_models_with_a_state_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherState:
        pass

    choose = patches._model_state(lambda config: OtherState)
    monkeypatch.setattr(patches, "uses_sparsemm", lambda config: config == "ours")
    monkeypatch.setattr(patches, "install_in_worker", lambda: None)
    assert choose("theirs") is OtherState
    with pytest.raises(UnsupportedError, match="this model needs OtherState"):
        choose("ours")
