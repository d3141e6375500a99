"""Poisoned KV, a debug aid: whoever touches a slot that is not its own is found at once.

A block is filled with NaN when a request gets it, before anything is written to it. Not when it is
freed: it may still be cached. The host notes who got the block, how often it has been given to
anyone (its generation), and which slots were written since. Every step is checked against these
notes: what it writes, and where the torch twins compute attention, each slot that they read. What
kernels read is not seen: if it is what nobody wrote, attention is NaN, and that is checked.
A read that should be made and is not, nothing here can tell.

Knows nothing of vLLM. Waits for the device in every step.
"""

from bisect import bisect_right
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from sparsemm_vllm.engine.worker.probes.holders import Holder
from sparsemm_vllm.engine.worker.probes.watched_cache import (
    NAN_BYTE,
    PoisonError,
    WatchedCache,
    number_slots,
)


class Poison:
    """Fills blocks with NaN and checks who writes and reads them.

    Args:
        cache: KV cache of the pruned layers, ``[L, B, Hkv, P, 2 * D]``; all of it is filled.
        window: observation window, `W`, in tokens.
        max_tokens: tokens of a step at most.
    """

    def __init__(self, cache: torch.Tensor, window: int, max_tokens: int) -> None:
        L, B, _, self._page_size, _ = cache.shape
        self._cache = cache
        self._window = window
        self._generation = np.zeros(B, dtype=np.int64)
        self._held_by = np.zeros(B, dtype=np.int64)  # requests that may read the block
        self._written = np.zeros((B, self._page_size), dtype=bool)
        self._owner = ["nobody"] * B
        self._content: list[bytes | None] = [None] * B
        self._may_be_shared = np.zeros(B, dtype=bool)
        self._holders: dict[int, Holder] = {}
        self._rows: list[Holder] = []
        self._query_start = [0]
        self._positions = np.zeros(0, dtype=np.int64)
        self._is_nan = torch.zeros(L, max_tokens, dtype=torch.bool, device=cache.device)
        self._slots = number_slots(cache) if cache.device.type == "cpu" else None
        self._fill(())

    def _fill(self, index: tuple[Any, ...]) -> None:
        """Fill a part of the cache with NaN."""
        if self._cache.element_size() == 1:
            self._cache.view(torch.uint8)[index] = NAN_BYTE
        else:
            self._cache[index] = torch.nan

    # Requests.

    def add(self, index: int, holder: Holder) -> None:
        """Enter a request that starts or resumes; its blocks are given to it in the next step."""
        self._holders[index] = holder

    def remove(self, request_id: str) -> None:
        """Forget a request that ended or was preempted, if it is known: it holds no block now."""
        for index, holder in self._holders.items():
            if holder.request_id == request_id:
                del self._holders[index]
                self._held_by[holder.blocks[self._freed(holder) :]] -= 1
                return

    def _freed(self, holder: Holder) -> int:
        """First blocks of a row that the request no longer holds."""
        if not holder.is_pruned:
            return 0
        return (holder.prompt_tokens - self._window) // self._page_size

    # A step, before it runs.

    def begin_step(
        self,
        requests: np.ndarray,
        query_start: np.ndarray,
        pruned_rows: set[int],
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_table: torch.Tensor,
        block_counts: np.ndarray,
    ) -> None:
        """Poison the blocks that requests got for this step, and check what it will write.

        Args:
            requests: index of each row's request, ``[R]``.
            query_start: first query of each row and the end of the last, ``[>= R + 1]``.
            pruned_rows: rows whose prompt the step prunes.
            positions: position of each token of the step in its request, ``[T]``.
            slots: cache slot of each token, as it will be written, ``[T]``.
            block_table: block table of the step, ``[R, max_blocks]``.
            block_counts: entries of each request's row, ``[max_requests]``.

        Raises:
            PoisonError: naming the request, the position and the block.
        """
        self.end_step()
        self._is_nan.fill_(False)  # of a dummy batch, which reads what nobody wrote
        for holder in self._holders.values():
            if holder.is_pruning:
                holder.is_pruning, holder.is_pruned = False, True
                self._held_by[holder.blocks[: self._freed(holder)]] -= 1
        self._rows = [self._holders[index] for index in requests.tolist()]
        self._query_start = query_start[: len(requests) + 1].tolist()
        tokens = self._query_start[-1]
        self._positions = positions[:tokens].cpu().numpy()
        fresh: list[int] = []
        for row, holder in enumerate(self._rows):
            known = len(holder.given) or len(holder.blocks)
            new = block_table[row, known : int(block_counts[requests[row]])].tolist()
            fresh += self._extend(holder, new)
        # Hits may be on blocks that another row got just now, and computes in this step.
        for holder in self._rows:
            new = holder.blocks[len(holder.generations) :]
            holder.generations += self._generation[new].tolist()
            self._held_by[holder.blocks[: self._hits(holder)]] += 1
        if fresh:
            self._fill((slice(None), torch.tensor(fresh, device=self._cache.device)))
        self._write(slots[:tokens].cpu().numpy())
        for row, holder in enumerate(self._rows):
            self._check_hits(holder)
            holder.hit_tokens = 0
            if row in pruned_rows:
                self._begin_prune(holder)

    def _hits(self, holder: Holder) -> int:
        """Blocks of a request that is new in this step that it shares."""
        return holder.hit_tokens // self._page_size

    def _extend(self, holder: Holder, new: list[int]) -> list[int]:
        """Append blocks to a request's row.

        Returns:
            Those that it is the only one to hold, to be filled.
        """
        fresh = []
        for entry, block in enumerate(holder.given + new, len(holder.blocks)):
            if holder.entries.get(block, -1) >= self._freed(holder):
                self._fail(
                    holder, block, f"is entry {holder.entries[block]} and {entry} of its row"
                )
            holder.entries[block] = entry
            holder.blocks.append(block)
            if entry < self._hits(holder):
                continue
            self._claim(holder, entry, block)
            copied = holder.hit_tokens - entry * self._page_size
            if holder.hit_tokens and copied > 0:  # a hit ended inside a block, which vLLM copied
                self._written[block, :copied] = True
                self._fill((slice(None), block, slice(None), slice(copied, None)))
            else:
                fresh.append(block)
        holder.given = []
        return fresh

    def _claim(self, holder: Holder, entry: int, block: int) -> None:
        """Note that a request is the only one to hold a block, which holds nothing yet."""
        self._check_free(holder, block)
        self._held_by[block] = 1
        self._generation[block] += 1
        self._written[block] = False
        self._owner[block] = holder.request_id
        known = entry < len(holder.contents)
        self._content[block] = holder.contents[entry] if known else None
        in_prompt = (entry + 1) * self._page_size <= holder.prompt_tokens
        self._may_be_shared[block] = in_prompt or not holder.compact_blocks

    def _check_free(self, holder: Holder, block: int) -> None:
        if not self._held_by[block]:
            return
        holders = [h for h in self._holders.values() if h is not holder]
        names = [h.request_id for h in holders if h.entries.get(block, -1) >= self._freed(h)]
        self._fail(holder, block, f"was given to it while {', '.join(names)} holds it")

    def _begin_prune(self, holder: Holder) -> None:
        holder.is_pruning = True
        needed = -(-holder.prompt_tokens // self._page_size) + holder.compact_blocks
        if len(holder.blocks) < needed:
            raise PoisonError(
                f"poison_freed: request {holder.request_id} has {len(holder.blocks)} blocks in the "
                f"step that prunes its {holder.prompt_tokens} tokens, and needs {needed}"
            )

    def _check_hits(self, holder: Holder) -> None:
        """That a new request's prefix was computed, and from the same tokens."""
        for entry in range(self._hits(holder)):
            block = holder.blocks[entry]
            if not self._written[block].all():
                self._fail(holder, block, "is a prefix hit, and was never computed")
            if not self._may_be_shared[block]:
                self._fail(holder, block, "is a prefix hit, and no prompt's")
            content = self._content[block]
            if content is not None and content != holder.contents[entry]:
                self._fail(holder, block, "is a prefix hit, and holds other tokens")

    def _write(self, slots: np.ndarray) -> None:
        """Note what the step writes, and check that each token goes to its own place."""
        P = self._page_size
        for holder, first, end in zip(
            self._rows, self._query_start, self._query_start[1:], strict=False
        ):
            written = slots[first:end] >= 0
            blocks, tokens = np.divmod(slots[first:end][written], P)
            positions = self._positions[first:end][written]
            entries = np.array([holder.entries.get(b, -1) for b in blocks.tolist()], dtype=int)
            is_compact, place = self._places(holder, entries, tokens)
            others = np.array([self._owner[b] != holder.request_id for b in blocks], dtype=bool)
            rewritten = self._written[blocks, tokens] & (positions < holder.prompt_tokens)
            for wrong, why in (
                (entries < 0, "is not one of its blocks"),
                (is_compact, "is a compact block"),
                (place != positions, "is the place of another position"),
                (others, "is a prefix hit, which nobody may write"),
                (rewritten, "holds a prompt token already"),
            ):
                if wrong.any():
                    at = int(wrong.argmax())
                    what = f"writes position {positions[at]}, slot {tokens[at]}"
                    self._fail(holder, int(blocks[at]), why, what)
            self._written[blocks, tokens] = True

    def _places(
        self, holder: Holder, entries: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which entries of a row are compact blocks, and the position of each slot if not."""
        prompt_blocks = -(-holder.prompt_tokens // self._page_size)
        behind = entries - holder.compact_blocks
        is_compact = (entries >= prompt_blocks) & (behind < prompt_blocks)
        entries = np.where(entries < prompt_blocks, entries, behind)
        return is_compact, entries * self._page_size + tokens

    # A step while it runs.

    def watch(self, layer: int, block_table: torch.Tensor) -> AbstractContextManager[Any]:
        """Check each slot that torch code reads or writes in this context, on the CPU.

        A dummy batch belongs to no request, and is not checked.

        Args:
            layer: layer of the cache that attends.
            block_table: the step's; whoever reads looks its row up there first.
        """
        assert self._slots is not None, "kernels on a device cannot be watched"
        if not self._rows:
            return nullcontext()
        return WatchedCache(
            partial(self.check_read, layer),
            partial(self.check_copy, layer),
            block_table,
            self._cache,
            self._slots,
        )

    def check_read(self, layer: int, row: int, slots: np.ndarray, is_nan: np.ndarray) -> None:
        """Check the slots that a row of the step reads.

        Args:
            layer: layer that reads.
            row: row of the block table.
            slots: number of each slot, as in `number_slots`.
            is_nan: whether it holds a NaN.

        Raises:
            PoisonError: naming the request, the layer, the position and the block.
        """
        holder = self._rows[row]
        layers, blocks, heads, tokens = np.unravel_index(slots, self._cache.shape[:4])
        entries = np.array([holder.entries.get(b, -1) for b in blocks.tolist()], dtype=int)
        is_compact, positions = self._places(holder, entries, tokens)
        tail_start = holder.prompt_tokens - self._window if holder.is_pruned else 0
        generations = np.array(holder.generations)[entries]
        for wrong, why in (
            (entries < 0, "is not one of its blocks"),
            (self._generation[blocks] != generations, "was given to another since"),
            (is_compact & (not holder.is_pruned), "is a compact block, and nothing is pruned yet"),
            (~is_compact & (layers != layer), "is read in another layer's place"),
            (~is_compact & (positions < tail_start), "held a pruned token"),
            (~is_compact & ~self._written[blocks, tokens], "holds nothing there yet"),
            (is_nan, "holds NaN there"),
        ):
            if wrong.any():
                at = int(wrong.argmax())
                where = f"position {positions[at]}"
                if entries[at] < 0 or is_compact[at]:
                    where = f"entry {entries[at]} of its row, layer slot {layers[at]}"
                what = f"reads {where}, head slot {heads[at]}, slot {tokens[at]} in layer {layer}"
                self._fail(holder, int(blocks[at]), why, what)

    def check_copy(self, layer: int, row: int, slots: np.ndarray, is_nan: np.ndarray) -> None:
        """Check the slots that a pruned row's kept tokens are copied to; see `check_read`."""
        holder = self._rows[row]
        _, blocks, heads, tokens = np.unravel_index(slots, self._cache.shape[:4])
        entries = np.array([holder.entries.get(b, -1) for b in blocks.tolist()], dtype=int)
        is_compact, _ = self._places(holder, entries, tokens)
        again = np.ones(len(slots), dtype=bool)
        again[np.unique(slots, return_index=True)[1]] = False
        for wrong, why in (
            (~is_compact | (entries < 0), "is not one of its compact blocks"),
            (again | ~is_nan, "holds a kept token there already"),
        ):
            if wrong.any():
                at = int(wrong.argmax())
                what = f"keeps a token of layer {layer} in head slot {heads[at]}, slot {tokens[at]}"
                self._fail(holder, int(blocks[at]), why, what)

    def check_output(self, layer: int, output: torch.Tensor) -> None:
        """Note which tokens' attention is NaN; on the CPU, fail at once.

        Does not wait for the device and is the same in every step, so that a CUDA graph holds it.

        Args:
            layer: layer that attended.
            output: attention of all tokens, padding ones too, ``[T, Hq, D]``.
        """
        is_nan = output.flatten(1).isnan().any(1)[: self._is_nan.shape[1]]
        self._is_nan[layer].fill_(False)
        self._is_nan[layer, : len(is_nan)].copy_(is_nan)
        if self._slots is not None:
            self.end_step()

    def end_step(self) -> None:
        """Fail if any attention of the step is NaN. Waits for the device.

        Raises:
            PoisonError: naming the request, the layer, the position and the block.
        """
        tokens = self._query_start[-1]
        if not tokens or not self._is_nan[:, :tokens].any():
            return
        layer, token = self._is_nan[:, :tokens].nonzero()[0].tolist()
        self._is_nan.fill_(False)
        holder = self._rows[bisect_right(self._query_start, token) - 1]
        position = int(self._positions[token])
        raise PoisonError(
            f"poison_freed: attention of request {holder.request_id}, position {position}, is NaN "
            f"in layer {layer}: it read a slot that nothing was written to, or the model computes "
            f"NaN; its blocks are {self._describe(holder)}"
        )

    def _describe(self, holder: Holder) -> str:
        pairs = zip(holder.blocks, holder.generations, strict=True)
        return ", ".join(f"{block} (generation {generation})" for block, generation in pairs)

    def _fail(self, holder: Holder, block: int, why: str, what: str = "") -> NoReturn:
        owner, generation = self._owner[block], self._generation[block]
        raise PoisonError(
            f"poison_freed: request {holder.request_id}{what and ' ' + what}: block {block} "
            f"(of {owner}, generation {generation}) {why}"
        )
