"""The worker's side: which requests are pruned, and where their new tokens go."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from sparsemm_vllm.kv_cache import SparseMMSpec
from sparsemm_vllm.layer_spec import uses_sparsemm
from sparsemm_vllm.recording import KeptRecorder
from sparsemm_vllm.settings import Settings
from sparsemm_vllm.step import PrunedCache, RequestTable, Step, correct_slots, plan_step
from sparsemm_vllm.support import UnsupportedError


class _StepMetadata(ModelSpecificAttnMetadata):
    """Hands the step to the metadata builder of the pruned layers."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        if isinstance(attn_metadata_builder.kv_cache_spec, SparseMMSpec):
            return {"step": self.step}
        return {}


class SparseMMModelState(DefaultModelState):
    """Keeps the table of running requests and corrects the slots of generated tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompt_tokens = np.zeros(self.max_num_reqs, dtype=np.int64)
        self._table: RequestTable | None = None
        self._group = 0

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: Any) -> None:
        """Find the pruned layers' cache, now that it has been allocated."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        groups = [
            i
            for i, group in enumerate(kv_cache_config.kv_cache_groups)
            if isinstance(group.kv_cache_spec, SparseMMSpec)
        ]
        if len(groups) != 1:
            raise UnsupportedError(
                f"SPARSEMM: vLLM put the layers to prune into {len(groups)} KV cache groups, not "
                "into one; their budgets cannot be counted together"
            )
        self._group = groups[0]
        group = kv_cache_config.kv_cache_groups[self._group]
        cache = _pruned_cache(self.vllm_config, group.kv_cache_spec, group.layer_names)
        folder = Settings.from_additional_config(self.vllm_config.additional_config).record_kept
        recorder = KeptRecorder(Path(folder), cache.own) if folder else None
        self._table = RequestTable(cache, self.max_num_reqs, recorder)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Enter a request that starts, or resumes after preemption."""
        super().add_request(req_index, new_req_data)
        assert self._table is not None
        self._prompt_tokens[req_index] = new_req_data.prompt_len
        self._table.add(req_index, new_req_data.prompt_len, new_req_data.req_id)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Plan the step, correct the slots, then build the attention metadata as vLLM does."""
        # Dummy batches carry request indices that mean nothing; they have no prefill length.
        if not for_capture and input_batch.prefill_len_np.all():
            step = self._plan(input_batch)
            correct_slots(
                step,
                slot_mappings[self._group],
                input_batch.positions,
                block_tables[self._group],
            )
            kwargs["model_specific_attn_metadata"] = _StepMetadata(step)
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            *args,
            for_capture=for_capture,
            **kwargs,
        )

    def _plan(self, input_batch: Any) -> Step:
        assert self._table is not None
        indices = input_batch.idx_mapping_np
        return plan_step(
            self._table,
            indices,
            self._prompt_tokens[indices],
            input_batch.query_start_loc_np,
            input_batch.seq_lens_cpu_upper_bound.numpy(),
        )


def _pruned_cache(
    vllm_config: VllmConfig, spec: SparseMMSpec, layer_names: list[str]
) -> PrunedCache:
    """One view over the layers' caches, which vLLM puts at equal strides into one allocation."""
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
    own = spec.layout.slice_of(get_pp_group().rank_in_group, get_tp_group().rank_in_group)
    if len(caches) != own[0].stop - own[0].start:
        raise UnsupportedError(
            f"SPARSEMM: this rank has {len(caches)} layers to prune, the layout expects "
            f"{own[0].stop - own[0].start}"
        )
    layers = {name: index for index, name in enumerate(layer_names)}
    return PrunedCache(tensor, layers, spec.layout, own)


def sparse_model_state(state_cls: type, vllm_config: VllmConfig) -> type:
    """Our model state in place of vLLM's default one, for models that SPARSEMM serves.

    Raises:
        UnsupportedError: for a model that needs a state of its own.
    """
    if not uses_sparsemm(vllm_config):
        return state_cls
    if state_cls is not DefaultModelState:
        raise UnsupportedError(
            f"SPARSEMM: this model needs {state_cls.__name__}, and SPARSEMM replaces the default "
            "model state only"
        )
    return SparseMMModelState
