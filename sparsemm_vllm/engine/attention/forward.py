"""What SPARSEMM adds to dense attention: attend to what was kept; score, select, compact.

All of it runs on the device, and the host does not wait for it: sizes and places are known on the
host.
"""

from typing import Any

import torch

from sparsemm_vllm.engine.worker.probes.kept import KeptRecorder
from sparsemm_vllm.engine.worker.probes.knockout import attend_without
from sparsemm_vllm.engine.worker.state import SparseState
from sparsemm_vllm.engine.worker.step import Step
from sparsemm_vllm.triton_kernels.batch import Prompts


def forward_sparse(
    step: Step,
    layer: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> None:
    """What follows the dense rows: the decode rows, the prompts that are complete now, records.

    Args:
        step: plan of this step.
        layer: attention layer of vLLM's, for its name and the scales of a quantised cache.
        query: queries of the step, ``[T, Hq, D]``.
        output: attention of the queries, ``[T, Hq, D]``; the decode rows are written.
        block_table: block numbers of each row, int32 ``[R, max_blocks]``.
        scale: factor of the attention logits.
    """
    state = step.state
    cache, index = state.cache.tensor, state.cache.layers[layer.layer_name]
    k_scale, v_scale = kv_scales(layer, cache.dtype)
    for batch in step.decodes:
        state.ops.sparse_decode(
            query, cache, index, block_table, batch, output, scale, k_scale, v_scale
        )
    for knockout in step.knockouts:
        if knockout.layer == index:
            attend_without(query, cache[index], block_table, knockout, output, scale)
    if step.prunes:
        with state.prune_timer.measure():
            for prompts in step.prunes:
                prune(state, index, query, block_table, prompts, scale, k_scale)
    if step.recorded is not None and state.attention is not None:
        keys = state.attention.keys[index]
        state.ops.top_keys(query, cache[index], block_table, step.recorded, keys)
    if state.poison is not None:
        state.poison.check_output(index, output)


def prune(
    state: SparseState,
    layer: int,
    query: torch.Tensor,
    block_table: torch.Tensor,
    prompts: Prompts,
    scale: float,
    k_scale: torch.Tensor | None,
) -> None:
    """Score, select and compact the prompts of one layer.

    Args:
        state: requests and memory of this rank.
        layer: layer to prune, an index in the cache.
        query: queries of the step, ``[T, Hq, D]``.
        block_table: block numbers of each row, int32 ``[R, max_blocks]``.
        prompts: prompts that this step completes.
        scale: factor of the attention logits.
        k_scale: factor of an fp8 cache's keys, float32, one element; none for other caches.
    """
    layout, workspace, cache = state.layout, state.workspace, state.cache.tensor
    if layout.rules.token_scores is not None:
        score_at_random(state, layer, prompts)
    else:
        state.ops.window_scores(
            query,
            cache[layer],
            block_table,
            prompts,
            workspace,
            layout.window,
            layout.pool_kernel,
            scale,
            k_scale,
        )
    if layout.rules.split is not None:
        split_layer(state, layer, prompts)
    state.ops.select_tokens(prompts, workspace, state.pages.lengths[:, layer], layout.window)
    if state.recorder is not None:
        _record(state, state.recorder, layer, prompts)
    state.ops.compact_kv(cache, layer, block_table, prompts, workspace, state.pages)


def _record(state: SparseState, recorder: KeptRecorder, layer: int, prompts: Prompts) -> None:
    """Write down what each head keeps. Waits for the device."""
    for prompt in prompts.entries:
        request = prompt.request
        lengths = state.pages.lengths[request, layer]
        written = slice(prompt.offset, prompt.offset + int(state.max_kept[request]))
        kept = state.workspace.positions[:, written]
        recorder.add(state.request_ids[request], kept, lengths, prompt.tokens)


def kv_scales(
    layer: Any, cache_dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Per-tensor scales of an fp8 cache's keys and values; none for other caches."""
    if cache_dtype != torch.float8_e4m3fn:
        return None, None
    return layer._k_scale, layer._v_scale


# What some methods do with the scores. One prompt after the other, some tens of small operations
# each, so a prune takes longer than with the kernels alone: these are methods to compare with.


def score_at_random(state: SparseState, layer: int, prompts: Prompts) -> None:
    """Write scores that are not the window's attention, in place of `window_scores`.

    Args:
        state: requests and memory of this rank; the layout's method has `token_scores`. Columns
            ``[offset, offset + n - W)`` of the workspace's scores are written.
        layer: layer to score, an index in the cache.
        prompts: prompts to score.
    """
    layout, scores = state.layout, state.workspace.scores
    assert layout.rules.token_scores is not None
    layers, heads = state.own
    for prompt in prompts.entries:
        older = prompt.tokens - layout.window
        scores[:, prompt.offset : prompt.offset + older] = layout.rules.token_scores(
            state.seeds[prompt.request],
            layers.start + layer,
            range(heads.start, heads.stop),
            older,
            scores.device,
        )


def split_layer(state: SparseState, layer: int, prompts: Prompts) -> None:
    """Divide a layer's tokens among its heads by their scores, before the tokens are selected.

    A layer's head pages follow those of the layers before it, each of which has as many as any
    split may need.

    Args:
        state: requests and memory of this rank; the layouts' method has `split`. The prompts'
            lengths and first pages of this layer are written.
        layer: layer whose tokens are divided, an index in the cache.
        prompts: prompts of this launch, all of them pruned.
    """
    pages, page_size = state.pages, state.page_size
    for prompt in prompts.entries:
        layout = state.layouts[prompt.request]
        assert layout.rules.split is not None
        older = slice(prompt.offset, prompt.offset + prompt.tokens - layout.window)
        lengths = layout.rules.split(state.workspace.scores[:, older], layout.base)
        head_pages = (lengths + page_size - 1) // page_size
        first_page = layer * layout.layer_pages(prompt.tokens, page_size)
        pages.lengths[prompt.request, layer] = lengths
        pages.first_pages[prompt.request, layer] = first_page + head_pages.cumsum(0) - head_pages
