"""Small pictures inside the window, behind a large one that fills vLLM's encoder cache.

vLLM ends a chunk before a picture that its encoder cache has no room for, computes the chunk, and
frees the picture before it. A chunk of SPARSEMM does not end inside the window: without more room
such a request would wait for itself.
"""

from typing import Any


def make_room_for_window(scheduler: Any, request: Any, start: int, end: int) -> None:
    """Let the encoder take all pictures that the chunk from `start` on needs at once.

    Pictures that begin in the window have no more tokens than it, so what is added is little. A
    request that holds a picture already does not wait for others, which may wait for the same.

    Args:
        scheduler: vLLM's.
        request: whose last chunk ended at `end`, inside its window.
        start: tokens before the chunk.
        end: position of what had no room.
    """
    cache = scheduler.encoder_cache_manager
    held = cache.get_cached_input_ids(request)
    needed = 0
    for index, feature in enumerate(request.mm_features):
        first, length = feature.mm_position.offset, feature.mm_position.length
        if index not in held and first <= end and first + length > start:
            needed += request.get_num_encoder_embeds(index)
    scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens, needed)
    missing = needed - (cache.num_freeable_slots if held else cache.cache_size)
    if missing > 0:
        cache.cache_size += missing
        cache.num_free_slots += missing
        cache.num_freeable_slots += missing
