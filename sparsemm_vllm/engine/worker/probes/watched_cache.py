"""Which slots of the KV cache torch code reads and writes, seen without touching that code."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

NAN_BYTE = 0x7F  # fp8 (e4m3)

Check = Callable[[int, np.ndarray, np.ndarray], None]


class PoisonError(RuntimeError):
    """A request touched a slot that does not belong to it or holds nothing."""


class WatchedCache(TorchFunctionMode):
    """Sees every read and write of the cache that torch code makes in this context.

    A read is an operation on the cache or a view of it whose result is in other memory. Which slots
    it reads is found by the same operation on the slots' numbers, which have the cache's geometry.

    Args:
        check_read: function that checks slots which are read. It gets the row of the block table,
            the number of each slot, and whether it holds a NaN.
        check_write: function that checks slots before they are written, in the same way.
        block_table: the step's; whoever reads the cache looks its row up there first.
        cache: KV cache of the pruned layers, ``[L, B, Hkv, P, 2 * D]``.
        slots: number of each slot, from `number_slots`.
    """

    def __init__(
        self,
        check_read: Check,
        check_write: Check,
        block_table: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        super().__init__()
        self._check_read, self._check_write = check_read, check_write
        self._table = block_table.untyped_storage().data_ptr()
        self._memory = cache.untyped_storage().data_ptr()
        self._width = cache.shape[4]
        self._slots = slots
        self._row: int | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and check what it touches."""
        if not args or not isinstance(args[0], torch.Tensor):
            return func(*args, **(kwargs or {}))
        source = args[0]
        memory = source.untyped_storage().data_ptr()
        if memory == self._table and func is torch.Tensor.__getitem__ and source.dim() == 2:
            self._row = args[1][0] if isinstance(args[1], tuple) else args[1]
        if memory != self._memory:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.__setitem__:
            self._check(self._check_write, source, source[args[1]], args[1])
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != memory:
            index = args[1] if func is torch.Tensor.__getitem__ else ()
            self._check(self._check_read, source, result, index)
        return result

    def _check(self, check: Check, source: torch.Tensor, values: torch.Tensor, index: Any) -> None:
        if self._row is None:
            raise PoisonError("poison_freed: the cache is read without the block table")
        strides = [stride // self._width for stride in source.stride()[:-1]]
        offset = source.storage_offset() // self._width
        slots = self._slots.as_strided(source.shape[:-1], strides, offset)[index]
        is_nan = _is_nan(values).any(-1)
        check(self._row, slots.flatten().numpy(), is_nan.flatten().numpy())


def _is_nan(values: torch.Tensor) -> torch.Tensor:
    if values.element_size() == 1:
        return (values.view(torch.uint8) & NAN_BYTE) == NAN_BYTE
    return values.isnan()


def number_slots(cache: torch.Tensor) -> torch.Tensor:
    """The number of each slot ``[l, b, h, t]``, counted in this order, where it lies in memory.

    Args:
        cache: KV cache of the pruned layers, ``[L, B, Hkv, P, 2 * D]``.

    Returns:
        int64, one-dimensional, a number for every ``2 * D`` elements of the cache's memory, up to
        its end.
    """
    shape, width = cache.shape[:4], cache.shape[4]
    strides = [stride // width for stride in cache.stride()[:4]]
    offset = cache.storage_offset() // width
    end = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    slots = torch.full((end,), -1, dtype=torch.int64)
    slots.as_strided(shape, strides, offset).copy_(torch.arange(shape.numel()).view(shape))
    return slots
