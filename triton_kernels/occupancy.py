"""How many programs of a kernel a multiprocessor runs at once."""

from dataclasses import dataclass
from typing import Any

import torch

# Source: CUDA C++ programming guide, technical specifications per compute capability.
WARP = 32  # threads
REGISTER_UNIT = 8  # registers of a thread are given out in multiples of this
RESERVED_SHARED = 1024  # bytes of shared memory that the system takes for each program
MOST_PROGRAMS = 32


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs of a multiprocessor share.

    Attributes:
        registers: number of 32-bit registers.
        shared_bytes: shared memory, in bytes.
        threads: threads that run at once.
    """

    registers: int
    shared_bytes: int
    threads: int

    @classmethod
    def of(cls, device: torch.device) -> "Multiprocessor":
        """The multiprocessor of a CUDA device."""
        found: Any = torch.cuda.get_device_properties(device)  # its stubs lack the registers
        return cls(
            found.regs_per_multiprocessor,
            found.shared_memory_per_multiprocessor,
            found.max_threads_per_multi_processor,
        )

    def programs(self, num_warps: int, registers: int, shared_bytes: int) -> int:
        """Programs at once.

        Args:
            num_warps: warps of a program.
            registers: registers of a thread.
            shared_bytes: shared memory of a program, in bytes.
        """
        threads = WARP * num_warps
        given = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
        return min(
            MOST_PROGRAMS,
            self.threads // threads,
            self.registers // (given * threads),
            self.shared_bytes // (shared_bytes + RESERVED_SHARED),
        )


def resident_programs(kernel: Any, device: torch.device) -> int:
    """Programs of a compiled kernel that the whole device runs at once.

    Args:
        kernel: compiled kernel of Triton's, launched before.
        device: CUDA device that it was launched on.
    """
    each = Multiprocessor.of(device).programs(
        kernel.metadata.num_warps, kernel.n_regs, kernel.metadata.shared
    )
    return each * torch.cuda.get_device_properties(device).multi_processor_count
