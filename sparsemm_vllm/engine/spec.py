"""The KV cache spec of a layer, in the worker that built it."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from sparsemm_vllm.kv_cache import SparseMMSpec
from sparsemm_vllm.plugin import NAME
from sparsemm_vllm.request_settings import RequestLimits
from sparsemm_vllm.settings import Settings
from sparsemm_vllm.support import UnsupportedError, build_layout, pruned_layers


def uses_sparsemm(vllm_config: VllmConfig) -> bool:
    """Whether any layer's backend is SPARSEMM."""
    attention = vllm_config.attention_config
    backends = [attention.backend, *attention.backend_per_kind.values()]
    return any(backend is not None and backend.name == NAME for backend in backends)


def sparse_spec(
    layer: Attention, spec: KVCacheSpec | None, vllm_config: VllmConfig
) -> KVCacheSpec | None:
    """The layer's spec with the model's budgets, if SPARSEMM prunes this layer.

    Raises:
        UnsupportedError: for a layer whose cache is not that of the model's configuration.
    """
    if type(spec) is not FullAttentionSpec or not uses_sparsemm(vllm_config):
        return spec
    _check_layer(layer, spec, vllm_config)
    settings = Settings.from_additional_config(vllm_config.additional_config)
    return replace_as(
        spec,
        SparseMMSpec,
        layout=build_layout(vllm_config, settings),
        prune_when_free_below=settings.prune_when_free_below,
        limits=RequestLimits.of(settings),
    )


def _check_layer(layer: Any, spec: FullAttentionSpec, vllm_config: VllmConfig) -> None:
    name = layer.layer_name
    model = vllm_config.model_config
    tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
    total_heads = model.get_total_num_kv_heads()
    if (backend := layer.attn_backend.get_name()) != NAME:
        raise UnsupportedError(
            f"SPARSEMM: layer {name} attends to the whole prompt with {backend}, which the model "
            "or --attention-config chose for it: its cache would not be pruned"
        )
    if {spec.head_size, spec.head_size_v} != {model.get_head_size()}:
        raise UnsupportedError(
            f"SPARSEMM: layer {name} has keys of {spec.head_size} numbers and values of "
            f"{spec.head_size_v}, the model's heads have {model.get_head_size()}: head pages hold "
            "one size only"
        )
    if extract_layer_index(name) not in pruned_layers(model):
        raise UnsupportedError(
            f"SPARSEMM: layer {name} attends to the whole prompt, but the model's configuration "
            "does not say so (layer_types)"
        )
    if spec.num_kv_heads * tensor_parallel != total_heads:
        raise UnsupportedError(
            f"SPARSEMM: layer {name} has {spec.num_kv_heads} KV heads on each of {tensor_parallel} "
            f"ranks, the model has {total_heads}: each KV head must lie on exactly one rank"
        )
    forward_context = vllm_config.compilation_config.static_forward_context
    sharing = [
        other
        for other, module in forward_context.items()
        if getattr(module, "kv_sharing_target_layer_name", None) == name
    ]
    if sharing:
        raise UnsupportedError(
            f"SPARSEMM: layers {', '.join(sharing)} share the KV cache of {name}; each would keep "
            "other tokens"
        )
