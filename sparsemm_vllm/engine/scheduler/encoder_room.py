"""Small pictures inside the window, behind a large one that fills vLLM's encoder cache.

vLLM ends a chunk before a picture that its encoder cache has no room for, computes the chunk, and
frees the picture before it. A chunk of SPARSEMM does not end inside the window: without more room
such a request would wait for itself. So the cache is larger than vLLM made it while such a request
needs it, and no longer. Nothing is allocated for its size: it counts what workers hold.
"""

from dataclasses import dataclass, field
from typing import Any

LENT = "_sparsemm_lent"  # attribute of the scheduler


@dataclass
class Lent:
    """Room in the encoder cache beyond what vLLM made.

    Attributes:
        usual_step: encoder embeddings that vLLM lets a step compute.
        slots: embeddings that the cache may hold beyond the size that vLLM gave it.
        waiting: computed tokens of each request that waits for room, by its id.
    """

    usual_step: int
    slots: int = 0
    waiting: dict[str, int] = field(default_factory=dict)


def make_room_for_window(scheduler: Any, request: Any, start: int, end: int) -> None:
    """Let the encoder take all pictures that the chunk from `start` on needs at once.

    Pictures that begin in the window have no more tokens than it, so what is added is little. A
    request that holds a picture already does not wait for others, which may wait for the same.

    Args:
        scheduler: scheduler of the engine.
        request: request with a last chunk that ended at `end`, inside its window.
        start: number of tokens before the chunk.
        end: position in the prompt of the picture that had no room, in tokens.
    """
    cache = scheduler.encoder_cache_manager
    held = cache.get_cached_input_ids(request)
    needed = 0
    for index, feature in enumerate(request.mm_features):
        first, length = feature.mm_position.offset, feature.mm_position.length
        if index not in held and first <= end and first + length > start:
            needed += request.get_num_encoder_embeds(index)
    lent = getattr(scheduler, LENT, None)
    if lent is None:
        lent = Lent(scheduler.max_num_encoder_input_tokens)
        setattr(scheduler, LENT, lent)
    lent.waiting[request.request_id] = request.num_computed_tokens
    scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens, needed)
    missing = needed - (cache.num_freeable_slots if held else cache.cache_size)
    if missing > 0:
        _lend(cache, lent, missing)


def take_room_back(scheduler: Any) -> None:
    """After a step: room that no request waits for or uses is no longer there.

    A request no longer waits when it has been scheduled, or is gone; one that is preempted waits
    anew. Pictures that are only cached beyond the size are the first that vLLM drops for others.

    Args:
        scheduler: scheduler of the engine.
    """
    lent = getattr(scheduler, LENT, None)
    if lent is None:
        return
    for request_id, tokens in list(lent.waiting.items()):
        request = scheduler.requests.get(request_id)
        if request is None or request.num_computed_tokens != tokens:
            del lent.waiting[request_id]
    if lent.waiting:
        return
    scheduler.max_num_encoder_input_tokens = lent.usual_step
    cache = scheduler.encoder_cache_manager
    _lend(cache, lent, -min(lent.slots, cache.num_freeable_slots))
    if not lent.slots:
        delattr(scheduler, LENT)


def _lend(cache: Any, lent: Lent, slots: int) -> None:
    """Change the cache's size; fewer free slots than none make vLLM evict before it allocates."""
    lent.slots += slots
    cache.cache_size += slots
    cache.num_free_slots += slots
    cache.num_freeable_slots += slots
