"""What SPARSEMM adds to dense attention: attend to what was kept; score, select, compact.

All of it runs on the device, and the host does not wait for it: sizes and places are known on the
host.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.worker.probes.kept import KeptRecorder
from sparsemm_vllm.engine.worker.probes.knockout import attend_without
from sparsemm_vllm.engine.worker.state import SparseState
from sparsemm_vllm.engine.worker.step import Step
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace


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
        step: this step.
        layer: vLLM's attention layer, for its name and the scales of a quantised cache.
        query: the step's queries, ``[T, Hq, D]``.
        output: ``[T, Hq, D]``; the decode rows are written.
        block_table: int32 ``[R, max_blocks]``.
        scale: of the attention logits.
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
        layer: index in the cache.
        query: the step's queries, ``[T, Hq, D]``.
        block_table: int32 ``[R, max_blocks]``.
        prompts: that this step completes.
        scale: of the attention logits.
        k_scale: of an fp8 cache's keys.
    """
    layout, workspace, cache = state.layout, state.workspace, state.cache.tensor
    if layout.rules.token_scores is not None:
        score_at_random(layout, state.own, layer, prompts, state.seeds, workspace)
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
        split_layer(state.layouts, layer, prompts, workspace, state.pages, state.page_size)
    state.ops.select_tokens(prompts, workspace, state.pages.lengths[:, layer], layout.window)
    if state.recorder is not None:
        _record(state, state.recorder, layer, prompts)
    state.ops.compact_kv(cache, layer, block_table, prompts, workspace, state.pages)


def _record(state: SparseState, recorder: KeptRecorder, layer: int, prompts: Prompts) -> None:
    """Write down what each head keeps. Waits for the device."""
    for _, request, _, n, offset in prompts.entries:
        lengths = state.pages.lengths[request, layer]
        kept = state.workspace.positions[:, offset : offset + int(state.max_kept[request])]
        recorder.add(state.request_ids[request], kept, lengths, n)


def kv_scales(
    layer: Any, cache_dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Per-tensor scales of an fp8 cache's keys and values; none for other caches."""
    if cache_dtype != torch.float8_e4m3fn:
        return None, None
    return layer._k_scale, layer._v_scale


# What some methods do with the scores. One prompt after the other, some tens of small operations
# each, so a prune takes longer than with the kernels alone: these are methods to compare with.


def score_at_random(
    layout: CacheLayout,
    own: tuple[slice, slice],
    layer: int,
    prompts: Prompts,
    seeds: Sequence[int],
    workspace: PruneWorkspace,
) -> None:
    """Write scores that are not the window's attention, in place of `window_scores`.

    Args:
        layout: of a method with `token_scores`.
        own: the layers and heads of the layout that this rank owns.
        layer: of these, whose tokens to score.
        prompts: the prompts to score.
        seeds: of all requests.
        workspace: columns ``[offset, offset + n - W)`` of `scores` are written.
    """
    assert layout.rules.token_scores is not None
    layers, heads = own
    for _, request, _, n, offset in prompts.entries:
        older = n - layout.window
        workspace.scores[:, offset : offset + older] = layout.rules.token_scores(
            seeds[request],
            layers.start + layer,
            range(heads.start, heads.stop),
            older,
            workspace.scores.device,
        )


def split_layer(
    layouts: Sequence[CacheLayout],
    layer: int,
    prompts: Prompts,
    workspace: PruneWorkspace,
    pages: HeadPages,
    page_size: int,
) -> None:
    """Divide a layer's tokens among its heads by their scores, before the tokens are selected.

    A layer's head pages follow those of the layers before it, each of which has as many as any
    split may need.

    Args:
        layouts: of all requests, of a method with `split`.
        layer: of this rank's, whose tokens to divide.
        prompts: the prompts of this launch, all of them pruned.
        workspace: scores, in.
        pages: the prompts' lengths and first pages of this layer are written.
        page_size: `P`, in tokens.
    """
    for _, request, _, n, offset in prompts.entries:
        layout = layouts[request]
        assert layout.rules.split is not None
        scores = workspace.scores[:, offset : offset + n - layout.window]
        lengths = layout.rules.split(scores, layout.base)
        head_pages = (lengths + page_size - 1) // page_size
        first_page = layer * layout.layer_pages(n, page_size)
        pages.lengths[request, layer] = lengths
        pages.first_pages[request, layer] = first_page + head_pages.cumsum(0) - head_pages
