"""The torch twins of the kernels: float32 inside, one request at a time, no host synchronisation.

Sizes that shape a tensor are Python integers known on the host; positions and lengths that only
the device knows stay tensors. None of the functions changes its inputs, but for `compact_kv`, which
writes the head pages.
"""

import torch
import torch.nn.functional as F


def window_scores(
    query: torch.Tensor, key: torch.Tensor, kernel_size: int = 5, scale: float | None = None
) -> torch.Tensor:
    """Score of every prompt token older than the observation window, per KV head.

    The window's causal attention over the whole prompt, averaged over the window's queries and over
    the query heads of each group, then average-pooled over positions (zeros beyond both ends
    count). Source: SnapKV, https://arxiv.org/abs/2404.14469, with the mean pooling of SparseMM.

    Args:
        query: queries of the prompt's last `W` tokens, position-encoded, ``[Hq, W, D]``.
        key: keys of the whole prompt, ``[Hkv, n, D]``.
        kernel_size: width of the pooling in tokens, odd.
        scale: factor of the logits; ``1 / sqrt(D)`` if not given.

    Returns:
        float32 ``[Hkv, n - W]``.

    Raises:
        ValueError: for shapes that do not fit together or an even kernel size.
    """
    Hq, W, D = query.shape
    Hkv, n, _ = key.shape
    if key.shape[2] != D or Hq % Hkv or n < W:
        raise ValueError(
            f"query {list(query.shape)} [Hq, W, D] and key {list(key.shape)} [Hkv, n, D] must "
            "share D, Hq must be a multiple of Hkv, and n must be at least W"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd and positive")
    grouped = query.float().reshape(Hkv, Hq // Hkv, W, D)
    logits = torch.einsum("hgwd,hnd->hgwn", grouped, key.float())
    logits *= D**-0.5 if scale is None else scale
    position = torch.arange(n, device=key.device)
    future = position[None, :] > position[n - W :, None]
    weights = logits.masked_fill_(future, -torch.inf).softmax(-1)[..., : n - W]
    mean = weights.mean((1, 2))
    if mean.shape[1] == 0:
        return mean
    return F.avg_pool1d(mean[None], kernel_size, stride=1, padding=kernel_size // 2)[0]


def top_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Position of the key with the largest logit for each of the last `Q` queries, causally.

    Ties go to the lowest position. Source: SparseMM (ICCV 2025), section 3.

    Args:
        query: queries, position-encoded, ``[Hq, Q, D]``.
        key: keys of all tokens up to the last query's, ``[Hkv, n, D]``.

    Returns:
        int32 ``[Hq, Q]``.
    """
    Hq, Q, D = query.shape
    Hkv, n, _ = key.shape
    grouped = query.float().reshape(Hkv, Hq // Hkv, Q, D)
    logits = torch.einsum("hgqd,hnd->hgqn", grouped, key.float())
    position = torch.arange(n, device=key.device)
    logits.masked_fill_(position[None, :] > position[n - Q :, None], -torch.inf)
    return logits.argmax(-1).flatten(0, 1).int()


def select_tokens(scores: torch.Tensor, capacities: torch.Tensor, width: int) -> torch.Tensor:
    """Positions of each head's best tokens, ascending; ties go to the lowest index.

    Args:
        scores: scores of each head's tokens, ``[Hkv, m]``.
        capacities: tokens to keep per head, int ``[Hkv]``, on the device of the scores.
        width: columns of the result; at least the largest ``min(capacity, m)``.

    Returns:
        int64 ``[Hkv, width]``; a head's unused columns, at its end, hold ``m``.
    """
    m = scores.shape[1]
    width = min(width, m)
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :width]
    unused = torch.arange(width, device=scores.device)[None] >= capacities[:, None]
    return best.masked_fill(unused, m).sort(dim=1).values


def kept_tokens(scores: torch.Tensor, capacities: torch.Tensor) -> list[torch.Tensor]:
    """Like `select_tokens`, one tensor of exact length per head: what tests and tools compare.

    Args:
        scores: scores of the tokens older than the window, ``[Hkv, n - W]``.
        capacities: tokens to keep per head, int ``[Hkv]``; larger ones keep every token.

    Returns:
        `Hkv` sorted int64 tensors of ``min(capacity, n - W)`` positions.
    """
    lengths = capacities.clamp(0, scores.shape[1]).tolist()
    selected = select_tokens(scores, capacities, max(lengths, default=0))
    return [row[:length] for row, length in zip(selected, lengths, strict=True)]


def read_tokens(
    layer_cache: torch.Tensor,
    row: torch.Tensor,
    positions: torch.Tensor,
    prompt_blocks: int,
    compact_blocks: int,
) -> torch.Tensor:
    """Keys and values of the tokens at `positions`, for all heads, through the block table.

    Args:
        layer_cache: one layer of the cache, ``[B, Hkv, P, 2 * D]``.
        row: row of the request in the block table, int ``[max_blocks]``.
        positions: positions of the tokens, from the start of the prompt, int64 ``[T]``.
        prompt_blocks: blocks of the prompt, `N`.
        compact_blocks: compact blocks of the request, `C`; blocks of generated tokens follow.

    Returns:
        ``[Hkv, T, 2 * D]``, in the cache's dtype.
    """
    page_size = layer_cache.shape[2]
    entry = positions // page_size
    entry = torch.where(entry < prompt_blocks, entry, entry + compact_blocks)
    return layer_cache[row[entry].long(), :, positions % page_size].transpose(0, 1)


def head_page_slots(
    cache: torch.Tensor,
    row: torch.Tensor,
    first_pages: torch.Tensor,
    tokens: torch.Tensor,
    prompt_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where kept token `t` of a head lies: the index of its slot in the cache.

    Args:
        cache: keys and values, ``[L, B, Hkv, P, 2 * D]``.
        row: row of the request in the block table, int ``[max_blocks]``.
        first_pages: first head page of each token's head, int, of the shape of `tokens` or
            broadcastable to it.
        tokens: rank of the token among those that its head keeps, from 0, int of any shape.
        prompt_blocks: blocks of the prompt, `N`.

    Returns:
        Layer, block, head slot and token slot, each of the shape of `tokens`.
    """
    L, _, Hkv, page_size, _ = cache.shape
    page = first_pages.long() + tokens // page_size
    block = row[prompt_blocks + page // (L * Hkv)].long()
    return page // Hkv % L, block, page % Hkv, tokens % page_size


def compact_kv(
    cache: torch.Tensor,
    layer: int,
    row: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    first_pages: torch.Tensor,
    total: int,
    prompt_blocks: int,
) -> None:
    """Copy each head's kept tokens from the prompt blocks to its head pages, bytes as they are.

    Args:
        cache: keys and values, ``[L, B, Hkv, P, 2 * D]``; only the head pages are written.
        layer: layer whose tokens are copied.
        row: row of the request in the block table, int ``[max_blocks]``.
        positions: positions of the kept tokens per head, ascending, int64 ``[Hkv, width]``, from
            `select_tokens`.
        lengths: kept tokens per head, int ``[Hkv]``, on the device.
        first_pages: first head page per head, int ``[Hkv]``, on the device.
        total: sum of the lengths, known on the host.
        prompt_blocks: blocks of the prompt, `N`.
    """
    Hkv, page_size = cache.shape[2:4]
    lengths = lengths.long()
    heads = torch.arange(Hkv, device=cache.device)
    head = torch.repeat_interleave(heads, lengths, output_size=total)
    start = lengths.cumsum(0) - lengths
    token = torch.arange(total, device=cache.device) - start[head]
    position = positions[head, token]
    source = row[position // page_size].long()
    slots = head_page_slots(cache, row, first_pages[head], token, prompt_blocks)
    cache[slots] = cache[layer, source, head, position % page_size]


def _attend(
    query: torch.Tensor, kv: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of ``[Q, Hq, D]`` over ``[Hkv, T, 2 * D]`` where `visible` ``[Hkv, Q, T]``."""
    Q, Hq, D = query.shape
    Hkv = kv.shape[0]
    unseen = ~visible.any(1)  # such slots may hold anything, NaN included
    key, value = kv.float().masked_fill(unseen[..., None], 0).split(D, -1)
    out = F.scaled_dot_product_attention(
        query.float().reshape(Q, Hkv, Hq // Hkv, D).permute(1, 2, 0, 3),
        key[:, None].expand(-1, Hq // Hkv, -1, -1),
        value[:, None].expand(-1, Hq // Hkv, -1, -1),
        attn_mask=visible[:, None],
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(Q, Hq, D).to(query.dtype)


def dense_attention(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    row: torch.Tensor,
    seq_len: int,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention of a request's last queries over all of its tokens.

    Args:
        query: queries of the tokens ``[seq_len - Q, seq_len)``, ``[Q, Hq, D]``.
        layer_cache: one layer of the cache, ``[B, Hkv, P, 2 * D]``.
        row: row of the request in the block table, without compact blocks, int ``[max_blocks]``.
        seq_len: tokens in the cache, those of this step included.
        scale: factor of the logits.
        sliding_window: tokens that a query sees, itself included; all if not given.

    Returns:
        ``[Q, Hq, D]``, in the query's dtype.
    """
    Q = query.shape[0]
    positions = torch.arange(seq_len, device=query.device)
    kv = read_tokens(layer_cache, row, positions, prompt_blocks=seq_len, compact_blocks=0)
    ahead = positions[None] - positions[seq_len - Q :, None]
    visible = ahead <= 0
    if sliding_window is not None:
        visible &= ahead > -sliding_window
    return _attend(query, kv, visible.expand(kv.shape[0], -1, -1), scale)


def sparse_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    layer: int,
    row: torch.Tensor,
    lengths: torch.Tensor,
    first_pages: torch.Tensor,
    longest: int,
    tail_start: int,
    prompt_blocks: int,
    compact_blocks: int,
    seq_len: torch.Tensor,
    max_seq_len: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of generated tokens over a pruned request: head pages, then the tail.

    Args:
        query: queries of the request's last `Q` tokens, ``[Q, Hq, D]``.
        cache: keys and values, ``[L, B, Hkv, P, 2 * D]``.
        layer: layer that attends.
        row: row of the request in the block table, int ``[max_blocks]``.
        lengths: tokens in the head pages of each KV head, int ``[Hkv]``.
        first_pages: first head page of each KV head, int ``[Hkv]``.
        longest: bound of `lengths`, known on the host.
        tail_start: position of the first token that all heads keep: ``n - W``.
        prompt_blocks: blocks of the prompt, `N`.
        compact_blocks: compact blocks of the request, `C`.
        seq_len: tokens of the request, those of this step included; a scalar on the device.
        max_seq_len: bound of `seq_len`, known on the host.
        scale: factor of the logits.

    Returns:
        ``[Q, Hq, D]``, in the query's dtype.
    """
    Q = query.shape[0]
    Hkv = cache.shape[2]
    device = query.device

    token = torch.arange(longest, device=device).expand(Hkv, -1)
    held = token < lengths[:, None]
    # Slots past a head's end are masked, but their addresses must exist: point at its first page,
    # and for an empty head, whose first page may lie past the last one, at page 0.
    token = torch.where(held, token, 0)
    first = torch.where(lengths > 0, first_pages, 0)[:, None].expand_as(token)
    head_kv = cache[head_page_slots(cache, row, first, token, prompt_blocks)]

    position = torch.arange(tail_start, max_seq_len, device=device)
    tail_kv = read_tokens(cache[layer], row, position, prompt_blocks, compact_blocks)
    query_position = seq_len - Q + torch.arange(Q, device=device)
    causal = position[None] <= query_position[:, None]

    visible = torch.cat([held[:, None].expand(-1, Q, -1), causal.expand(Hkv, -1, -1)], -1)
    return _attend(query, torch.cat([head_kv, tail_kv], 1), visible, scale)
