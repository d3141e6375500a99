"""The memory of a rank: its state, and its view of the KV cache, as vLLM's configuration says."""

from itertools import pairwise
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.config import Serving, UnsupportedError
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.worker.probes.kept import KeptRecorder
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.triton_kernels.tile_sizes import decode_options

# Programs of the decode kernel on each multiprocessor that there is scratch memory for. As many are
# launched as its registers and shared memory allow, which `warm_up` asks the compiled kernel.
MOST_PROGRAMS_PER_MULTIPROCESSOR = 4


def allocate_state(
    vllm_config: VllmConfig, max_requests: int, max_tokens: int, device: torch.device
) -> SparseState:
    """The rank's state, before vLLM measures the memory that is left for the KV cache.

    Args:
        vllm_config: configuration of the engine.
        max_requests: requests that run at once.
        max_tokens: tokens of the longest prompt, or of a step if they are more.
        device: device of the worker.
    """
    model, cache_config = vllm_config.model_config, vllm_config.cache_config
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    serving = Serving.of(vllm_config)
    settings, layout = serving.settings, serving.layout
    own = layout.slice_of(get_pp_group().rank_in_group, get_tp_group().rank_in_group)
    if is_quantized_kv_cache(cache_config.cache_dtype):
        cache_dtype = torch.float8_e4m3fn
    else:
        cache_dtype = kv_cache_dtype_str_to_dtype(cache_config.cache_dtype, model)
    heads = Heads(
        own[0].stop - own[0].start,
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
        cache_dtype,
        model.dtype,
    )
    drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
    multiprocessors = current_platform.num_compute_units() if device.type == "cuda" else 2
    capacity = Capacity(
        max_requests,
        max_tokens,
        MOST_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors,
        1 + drafts,
        settings.record_attention,
        _listed_pages(layout, heads, cache_config.block_size, max_tokens),
    )
    recorder = KeptRecorder(Path(settings.record_kept), own) if settings.record_kept else None
    return SparseState(layout, own, heads, capacity, device, recorder)


def _listed_pages(layout: CacheLayout, heads: Heads, page_size: int, longest: int) -> int:
    """Head pages of a request at most, if the decode kernel is to look up where they are."""
    assert heads.query_dtype is not None
    if not decode_options(heads.D, heads.dtype, heads.query_dtype, block_m=16).lists_pages:
        return 0
    return layout.most_compact_blocks(longest, page_size) * heads.L * heads.Hkv


def pruned_cache(
    vllm_config: VllmConfig, spec: SparseMMSpec, layer_names: list[str]
) -> PrunedCache:
    """One view over the layers' caches, which vLLM puts at equal strides into one allocation.

    Args:
        vllm_config: configuration whose layers have got their caches.
        spec: spec of the pruned layers.
        layer_names: names of these layers.

    Raises:
        UnsupportedError: if the caches lie otherwise, or have other blocks.
    """
    context = vllm_config.compilation_config.static_forward_context
    caches = [context[name].kv_cache for name in layer_names]
    offsets = {b.storage_offset() - a.storage_offset() for a, b in pairwise(caches)}
    first = caches[0]
    same = all(
        c.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and c.shape == first.shape
        and c.stride() == first.stride()
        for c in caches
    )
    if not same or len(offsets) > 1:
        raise UnsupportedError(
            "SPARSEMM: vLLM did not put the KV caches of the layers to prune at equal distances "
            "into one allocation; head pages cannot be striped over them"
        )
    if first.shape[2] != spec.block_size:
        raise UnsupportedError(
            f"SPARSEMM: the attention kernel splits blocks of {spec.block_size} tokens into blocks "
            f"of {first.shape[2]}; start vLLM with --block-size {first.shape[2]}"
        )
    layer_stride = offsets.pop() if offsets else 0
    tensor = first.as_strided((len(caches), *first.shape), (layer_stride, *first.stride()))
    if is_quantized_kv_cache(vllm_config.cache_config.cache_dtype):
        tensor = tensor.view(torch.float8_e4m3fn)
    return PrunedCache(tensor, {name: index for index, name in enumerate(layer_names)})
