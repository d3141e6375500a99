"""What watches a step for operations that wait for the device.

Two watches. With the interpreter the kernels run and the CPU stands for the device: there, what
reads values is known by name. On PyTorch's meta device no tensor has values and no kernel runs:
what reads one raises by itself, and every copy from the host can be told from work on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.utils import gpu_sync_debug

# A meta tensor has no values: what reads one, on whatever path, raises.
META = torch.device("meta")

# What reads a value, or makes a shape from values, on the device.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class NoWaiting(TorchDispatchMode):
    """Raises where CUDA would wait, if values of what stands for the device are read or copied."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if isinstance(args[0] if args else None, torch.Tensor) and args[0].device == self.device:
            self.check_values(name, args, kwargs or {})
        if name in ("copy_", "_to_copy"):
            check_copy(name, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    @staticmethod
    def check_values(name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in WAITS:
            raise AssertionError(f"aten::{name} waits for the device")
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"aten::{name} with a mask waits for the device"
        if name == "repeat_interleave":
            size = kwargs.get("output_size")
            assert size is not None, "repeat_interleave waits for the device"


def check_copy(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Between host and device only copies that vLLM's own checker lets pass."""
    if name == "copy_":
        target, source = args[0].device, args[1]
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking")
    else:
        source, asynchronous = args[0], kwargs.get("non_blocking")
        target = torch.device(kwargs.get("device") or source.device)
    if (source.device.type == "cpu") == (target.type == "cpu"):
        return
    assert source.device.type == "cpu", "a copy to the host waits for the device"
    assert asynchronous, "a copy that blocks waits for the device"
    stalls = gpu_sync_debug._cpu_copy_stall_reason(source, torch.device("cuda"))
    assert stalls is None, f"{stalls}: the copy waits for the device"


class NoHostValues(TorchFunctionMode):
    """Raises where Python values reach the device by a copy of their own, which CUDA waits for.

    PyTorch makes these copies where no dispatch mode sees them. A number that is assigned to one
    element is one of them: CUDA copies it from the host. Assigned to a slice, even of one element,
    it is filled in by a kernel.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = torch.device(kwargs.get("device") or "cpu")
            assert device.type == "cpu", f"{func.__name__} on the device copies from the host"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            tensor, index, *value = args
            indices = index if isinstance(index, tuple) else (index,)
            if tensor.device.type != "cpu":
                for i in indices:
                    listed = isinstance(i, list | np.ndarray)
                    listed |= isinstance(i, torch.Tensor) and i.device.type == "cpu"
                    assert not listed, "indices are copied from the host"
                if value and isinstance(value[0], Number):
                    one = sum(isinstance(i, int | np.integer) for i in indices) == tensor.ndim
                    assert not one, "a number assigned to one element is copied from the host"
        return func(*args, **kwargs)


@contextmanager
def no_waiting(device: torch.device = META) -> Iterator[None]:
    """Raise where CUDA would wait for what `device` stands for."""
    with NoHostValues(), NoWaiting(device):
        yield
