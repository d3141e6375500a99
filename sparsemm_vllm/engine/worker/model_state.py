"""The worker's side: which requests are pruned, and where their new tokens go."""

import hashlib
import json
from typing import Any

import torch
from typing_extensions import override
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from sparsemm_vllm.budget.request import received
from sparsemm_vllm.engine.config import Serving, UnsupportedError, pruned_layers
from sparsemm_vllm.engine.spec import SparseMMSpec
from sparsemm_vllm.engine.worker.allocate import allocate_state, pruned_cache
from sparsemm_vllm.engine.worker.probes.holders import Holder, block_contents
from sparsemm_vllm.engine.worker.probes.masked_heads import mask_layers
from sparsemm_vllm.engine.worker.probes.poison import Poison
from sparsemm_vllm.engine.worker.startup_log import describe_serving
from sparsemm_vllm.engine.worker.step import Step, capture_step, plan_step
from sparsemm_vllm.engine.worker.warm_up import warm_up
from sparsemm_vllm.names import NAME
from sparsemm_vllm.triton_kernels.batch import Rows

logger = init_logger("vllm.sparsemm")


class SparseMMModelState(DefaultModelState):
    """Keeps the running requests and tells the metadata builders what a step does to them."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: Any,
        encoder_cache: Any,
        device: torch.device,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device, *args, **kwargs)
        self._serving = Serving.of(vllm_config)
        self._state = allocate_state(
            vllm_config, self.max_num_reqs, max(self.max_model_len, self.max_num_tokens), device
        )
        self._group = 0
        self._block_tables: Any = None
        settings = self._serving.settings
        if settings.mask_heads:
            layers = get_layers_from_vllm_config(vllm_config, Attention)
            rank = get_tp_group().rank_in_group
            mask_layers(layers, settings.mask_heads, rank)

    def release_kv_cache(self) -> None:
        """Let go of the KV cache, before vLLM allocates another."""
        self._state.detach()
        if self.device.type == "cuda":
            torch.accelerator.empty_cache()

    @override
    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As vLLM's, and find the pruned layers' cache, now that it has been allocated."""
        super().initialize_kv_cache(kv_cache_config, block_tables, *args, **kwargs)
        self._group = _pruned_group(kv_cache_config)
        self._block_tables = block_tables
        group = kv_cache_config.kv_cache_groups[self._group]
        cache = pruned_cache(self.vllm_config, group.kv_cache_spec, group.layer_names)
        if len(cache.layers) != (expected := self._state.heads.L):
            raise UnsupportedError(
                f"SPARSEMM: this rank has {len(cache.layers)} layers to prune, the layout expects "
                f"{expected}"
            )
        self._state.attach(cache)
        if self._serving.settings.poison_freed:
            self._poison(cache.tensor, len(kv_cache_config.kv_cache_groups))
        self._describe_serving(kv_cache_config.num_blocks, group.kv_cache_spec)
        if self.device.type == "cuda":
            self._warm_up(kv_cache_config, block_tables.input_block_tables)

    def _poison(self, cache: torch.Tensor, groups: int) -> None:
        """Fill the pruned layers' cache with NaN, and watch it from now on."""
        window = self._state.layout.window
        self._state.poison = Poison(cache, window, self.max_num_tokens)
        if groups > 1:
            # vLLM reads the null block where a sliding window has passed, and masks it.
            cache[:, 0] = 0

    def _describe_serving(self, num_blocks: int, spec: Any) -> None:
        """Log what is served, once: vLLM also comes here before it knows the number of blocks."""
        sized = num_blocks == self.vllm_config.cache_config.num_gpu_blocks
        if sized and get_pp_group().is_first_rank and get_tp_group().is_first_rank:
            sizes = num_blocks, spec.block_size, spec.page_size_bytes
            logger.info(describe_serving(self.vllm_config, self._serving, *sizes))

    def _warm_up(self, kv_cache_config: KVCacheConfig, block_tables: list[torch.Tensor]) -> None:
        """Compile what serving launches, also in layers that stay dense.

        Args:
            kv_cache_config: groups of layers.
            block_tables: block table of each group, int32 ``[max_requests, max_blocks]``.
        """
        warm_up(self._state, self.dtype, block_tables[self._group])
        layers = self.vllm_config.compilation_config.static_forward_context
        for group, table in zip(kv_cache_config.kv_cache_groups, block_tables, strict=True):
            for layer in map(layers.__getitem__, group.layer_names):
                if layer.get_attn_backend().get_name() == NAME:
                    layer.impl.warm_up_dense(layer, self.dtype, table)

    @override
    def add_request(self, req_index: int, new_req_data: Any, *args: Any, **kwargs: Any) -> None:
        """Enter a request that starts, or resumes after preemption."""
        super().add_request(req_index, new_req_data, *args, **kwargs)
        state, n, params = self._state, new_req_data.prompt_len, new_req_data.sampling_params
        accepted = received(params.extra_args, self._serving.limits)
        layout = accepted.layout(state.layout)
        seed = request_seed(new_req_data) if layout.rules.token_scores else 0
        state.add(req_index, n, new_req_data.req_id, seed, layout)
        if state.attention is not None:
            asked = accepted.settings
            dense = params.max_tokens == 1 or not layout.is_pruned(n)
            try:
                state.attention.add(req_index, n, asked.sparsemm_record, dense)
                state.knockouts.add(req_index, n, asked.sparsemm_knockout)
            except ValueError as error:  # of the client: the engine lives
                logger.error("SPARSEMM: request %s: %s", new_req_data.req_id, error)
        if state.poison is not None:
            holder = self._block_holder(new_req_data, int(state.compact_blocks[req_index]))
            state.poison.add(req_index, holder)

    def _block_holder(self, new_req_data: Any, compact_blocks: int) -> Holder:
        """A request, as `poison_freed` sees it."""
        pictures = [
            (f.mm_position.offset, f.mm_position.length, f.identifier)
            for f in new_req_data.mm_features
        ]
        lora = new_req_data.lora_request
        return Holder(
            new_req_data.req_id,
            new_req_data.prompt_len,
            compact_blocks,
            new_req_data.num_computed_tokens,
            block_contents(
                new_req_data.prefill_token_ids,
                pictures,
                "" if lora is None else lora.lora_name,
                self._state.page_size,
            ),
            list(new_req_data.block_ids[self._group]),
        )

    @override
    def remove_request(self, req_id: str, *args: Any, **kwargs: Any) -> None:
        """Forget a request that ended or was preempted."""
        super().remove_request(req_id, *args, **kwargs)
        if self._state.poison is not None:
            self._state.poison.remove(req_id)

    @override
    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, when a step has run."""
        super().postprocess_state(*args, **kwargs)
        if self._state.poison is not None:
            self._state.poison.end_step()

    def read_attention(self, rows: int) -> tuple[list[int], int, int, bytes]:
        """What was recorded of this rank's heads, for `read_attention` of the profiler.

        Returns:
            The layers of the model, its first query head and their number, and the positions, int32
            ``[layers, rows, heads]``.
        """
        state = self._state
        assert state.attention is not None, "the engine was not started with record_attention"
        layers = pruned_layers(self.vllm_config.model_config)[state.own[0]]
        first_head = state.own[1].start * state.heads.G
        return layers, first_head, state.heads.Hq, state.attention.read(rows)

    def take_prune_seconds(self) -> float:
        """Time that pruning took in steps before, as far as it is known and was not taken yet."""
        return self._state.prune_timer.take()

    @override
    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Plan the step, correct the slots, then build the attention metadata as vLLM does."""
        step = self._plan(input_batch, cudagraph_mode, for_capture)
        if step is not None:
            # Dummy batches carry request indices that mean nothing.
            requests = input_batch.idx_mapping[:0] if for_capture else input_batch.idx_mapping
            rows = Rows(
                block_tables[self._group],
                input_batch.query_start_loc,
                input_batch.seq_lens,
                requests,
            )
            step.prepare(slot_mappings[self._group], input_batch.positions, rows)
            if self._state.poison is not None:
                self._state.poison.begin_step(
                    input_batch.idx_mapping_np[: len(requests)],
                    input_batch.query_start_loc_np,
                    {prompt.batch_row for prompts in step.prunes for prompt in prompts.entries},
                    input_batch.positions,
                    slot_mappings[self._group],
                    block_tables[self._group],
                    self._block_tables.num_blocks.np[self._group],
                )
        for group in attn_groups[self._group]:
            group.get_metadata_builder(0).step = step
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture,
            *args,
            **kwargs,
        )

    def _plan(self, batch: Any, cudagraph_mode: Any, for_capture: bool) -> Step | None:
        """The step; none for batches that only measure memory or wake kernels up."""
        if for_capture:
            return capture_step(self._state, batch.num_reqs, int(batch.num_scheduled_tokens.max()))
        if not batch.prefill_len_np.all():
            return None
        full_graph = cudagraph_mode == CUDAGraphMode.FULL
        step = plan_step(
            self._state,
            batch.idx_mapping_np,
            batch.query_start_loc_np,
            batch.seq_lens_cpu_upper_bound.numpy(),
            batch.num_reqs_after_padding if full_graph else None,
        )
        if full_graph and (step.prunes or step.pruned_rows):
            raise RuntimeError("vLLM replays a decode graph for a step that prunes a prompt")
        return step


def _pruned_group(kv_cache_config: KVCacheConfig) -> int:
    """Index of the KV cache group of the layers to prune.

    Raises:
        UnsupportedError: if they are not in one group.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    groups = [i for i, spec in enumerate(specs) if isinstance(spec, SparseMMSpec)]
    if len(groups) != 1:
        raise UnsupportedError(
            f"SPARSEMM: vLLM put the layers to prune into {len(groups)} KV cache groups, not "
            "into one; their budgets cannot be counted together"
        )
    return groups[0]


def request_seed(new_req_data: Any) -> int:
    """64 bits of what a request asks: its prompt and pictures, not its name.

    vLLM knows pictures by their contents, but by the request's name if both of its caches that go
    by contents are off.
    """
    asked = (new_req_data.prompt_token_ids, [f.identifier for f in new_req_data.mm_features])
    digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8)
    return int.from_bytes(digest.digest())


def sparse_model_state(state_cls: type) -> type:
    """Our model state in place of vLLM's default one, for models that SPARSEMM serves.

    Raises:
        UnsupportedError: for a model that needs a state of its own.
    """
    if state_cls is not DefaultModelState:
        raise UnsupportedError(
            f"SPARSEMM: this model needs {state_cls.__name__}, and SPARSEMM replaces the default "
            "model state only"
        )
    return SparseMMModelState
