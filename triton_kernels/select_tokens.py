"""Which prompt tokens each head keeps: the best scores, found by a radix select."""

import torch
import triton
import triton.language as tl

from .batch import Prompts, PruneWorkspace
from .tables import OFFSET, REQUEST, TOKENS

# Moved per head: 4 * m bytes of scores, once if they fit one tile, else five times, all but the
# first time from the L2 cache; 4 * k bytes of positions. About 20 integer operations a score and
# pass. One program a head has the latency of its tiles, one after the other: 5 * m / 4096.


def tiles(max_scores: int) -> dict[str, int | bool]:
    """Launch options for heads of up to `max_scores` scores."""
    # 8 warps of 32 threads hold at least one 16-byte load of scores each.
    block = min(4096, max(1024, triton.next_power_of_2(max_scores)))
    return {"BLOCK": block, "ONE_TILE": max_scores <= block, "num_warps": 8}


@triton.jit
def _load_keys(scores_ptr, columns, m):
    """Scores as unsigned integers of the same order."""
    # Up to a multiple of 16 columns, all of them the prompt's: no 16-byte load is split.
    scores = tl.load(scores_ptr + columns, mask=columns < tl.cdiv(m, 16) * 16, other=0.0)
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 and 0.0 are a tie
    bits = scores.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000)


@triton.jit(
    do_not_specialize_on_alignment=["lengths_ptr", "request_ptr", "tokens_ptr", "offset_ptr"]
)
def _select_tokens_kernel(
    scores_ptr,
    positions_ptr,
    lengths_ptr,
    request_ptr,
    tokens_ptr,
    offset_ptr,
    stride_sh,
    stride_ph,
    stride_lr,
    stride_lh,
    window,
    BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    prompt, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    request = tl.load(request_ptr + prompt).to(tl.int64)
    m = tl.load(tokens_ptr + prompt) - window
    k = tl.load(lengths_ptr + request * stride_lr + head * stride_lh)
    if k <= 0:
        return
    offset = tl.multiple_of(tl.load(offset_ptr + prompt), 16)
    scores_ptr += head * stride_sh + offset
    positions_ptr += head * stride_ph + offset
    if ONE_TILE:
        keys = _load_keys(scores_ptr, tl.arange(0, BLOCK), m)

    # The k-th largest key, 8 bits a pass from the top. `threshold` holds its bits under `decided`;
    # of the keys that agree in these, the `ties` largest are kept. Nothing decided keeps all k.
    threshold = tl.full([], 0, tl.uint32)
    decided = tl.full([], 0, tl.uint32)
    ties = k
    if k < m:
        for byte in range(4):
            shift = 24 - 8 * byte
            count = tl.zeros([256], tl.int32)
            for start in range(0, m, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                if not ONE_TILE:
                    keys = _load_keys(scores_ptr, columns, m)
                candidate = (columns < m) & ((keys & decided) == threshold)
                digits = ((keys >> shift) & 255).to(tl.int32)
                count += tl.histogram(digits, 256, mask=candidate)
            at_least = tl.cumsum(count, reverse=True)
            digit = tl.sum((at_least >= ties).to(tl.int32)) - 1
            ties -= tl.sum(tl.where(tl.arange(0, 256) > digit, count, 0))
            threshold |= digit.to(tl.uint32) << shift
            decided = (decided >> 8) | 0xFF000000

    above = 0
    tied = 0
    for start in range(0, m, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        if not ONE_TILE:
            keys = _load_keys(scores_ptr, columns, m)
        is_above = ((columns < m) & (keys > threshold)).to(tl.int32)
        is_tied = ((columns < m) & (keys == threshold)).to(tl.int32)
        tied_before = tied + tl.cumsum(is_tied) - is_tied
        rank = above + tl.cumsum(is_above) - is_above + tl.minimum(tied_before, ties)
        kept = (is_above > 0) | ((is_tied > 0) & (tied_before < ties))
        tl.store(positions_ptr + rank, columns, mask=kept)
        above += tl.sum(is_above)
        tied += tl.sum(is_tied)


def select_tokens(
    prompts: Prompts, workspace: PruneWorkspace, lengths: torch.Tensor, window: int
) -> None:
    """Write the positions of each head's best tokens, ascending, to ``workspace.positions``.

    A prompt's scores are the ``n - W`` columns of ``workspace.scores`` from its first column on.
    Head `h` keeps the ``k = lengths[request, h]`` largest, the lowest positions of equal ones; the
    `k` columns of ``workspace.positions`` from the prompt's first on are written. Selection:
    SnapKV, https://arxiv.org/abs/2404.14469, with SparseMM's lengths.

    Args:
        prompts: prompts of this launch.
        workspace: workspace; its scores are read, its positions written.
        lengths: kept tokens of each head, int32 ``[max_requests, Hkv]``, any strides; more than
            ``n - W`` keep all.
        window: tokens of the observation window, `W`.

    Raises:
        ValueError: for tensors of another shape, layout or type.
    """
    scores, positions = workspace.scores, workspace.positions
    Hkv = scores.shape[0]
    if scores.dtype != torch.float32 or scores.stride(1) != 1:
        raise ValueError(
            f"scores are {scores.dtype}, stride {scores.stride()}; float32 rows wanted"
        )
    if positions.dtype != torch.int32 or positions.stride(1) != 1:
        raise ValueError(
            f"positions are {positions.dtype}, stride {positions.stride()}; int32 rows wanted"
        )
    if lengths.dtype != torch.int32 or lengths.ndim != 2 or lengths.shape[1] != Hkv:
        raise ValueError(
            f"lengths are {lengths.dtype} {list(lengths.shape)}; "
            f"int32 [max_requests, Hkv = {Hkv}] wanted"
        )
    table = prompts.table
    _select_tokens_kernel[(prompts.count, Hkv)](
        scores,
        positions,
        lengths,
        table[REQUEST],
        table[TOKENS],
        table[OFFSET],
        scores.stride(0),
        positions.stride(0),
        *lengths.stride(),
        window,
        **tiles(prompts.max_tokens - window),
    )
