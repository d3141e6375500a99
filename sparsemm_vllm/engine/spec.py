"""The KV cache spec of the pruned layers: made in the workers, read by the scheduler."""

from dataclasses import dataclass
from typing import Any

from typing_extensions import override
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.engine.config import Serving, UnsupportedError, pruned_layers, uses_sparsemm
from sparsemm_vllm.engine.vllm_api.compatibility import require_installed
from sparsemm_vllm.names import NAME


@dataclass(frozen=True, kw_only=True)
class SparseMMSpec(FullAttentionSpec):
    """Full attention whose prompts are pruned: equal for all pruned layers of all ranks.

    None exists in a process where SPARSEMM is not installed: vLLM would take the manager of dense
    attention for it there, without a word.

    Args:
        layout: cache layout of the server, for requests that ask for no other budget.
        prune_when_free_below: share of the pool's blocks, 0 to 1; see `Settings`.
        limits: limits of what requests may ask for; if not given, the layout's.
    """

    layout: CacheLayout
    prune_when_free_below: float | None = None
    limits: RequestLimits | None = None

    @override
    def __post_init__(self) -> None:
        require_installed()
        super().__post_init__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        require_installed()
        self.__dict__.update(state)

    @classmethod
    @override
    def merge(cls, specs: list["SparseMMSpec"]) -> "SparseMMSpec":
        """Ours asks that the layers of a group have equal specs, and takes the first."""
        assert all(spec == specs[0] for spec in specs), "SPARSEMM layers must have equal specs"
        return specs[0]

    @override
    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Ours lets only equal specs share a group."""
        return all(spec == self for spec in kv_cache_specs.values())

    @override
    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Ours adds entries for the compact blocks, beside those for the prompt blocks."""
        compact = self.layout.most_compact_blocks(max_len, self.block_size)
        return cdiv(max_len, self.block_size) + compact

    @override
    def max_memory_usage_bytes(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> int:
        """Ours adds the compact blocks of one request of the greatest length."""
        longest = vllm_config.model_config.max_model_len
        compact = self.layout.most_compact_blocks(longest, self.block_size)
        dense = super().max_memory_usage_bytes(vllm_config, *args, **kwargs)
        return dense + compact * self.page_size_bytes


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
    serving = Serving.of(vllm_config)
    return replace_as(
        spec,
        SparseMMSpec,
        layout=serving.layout,
        prune_when_free_below=serving.settings.prune_when_free_below,
        limits=serving.limits,
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
