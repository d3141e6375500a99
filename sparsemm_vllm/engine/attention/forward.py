"""What some methods do with the scores of the prompts that a step completes, in torch.

On the device, without waiting for it: sizes and places are known on the host. One prompt after the
other, some tens of small operations each, so a prune takes longer than with the kernels alone:
these are methods to compare with.
"""

from collections.abc import Sequence

from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace


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
