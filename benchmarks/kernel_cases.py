"""Inputs for kernel tests: paged caches with permuted tables, poisoned where nobody may read."""

from dataclasses import dataclass

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from sparsemm_vllm.triton_kernels.batch import HeadPages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Relative error (norm) allowed against a float64 reference.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

FP8 = torch.float8_e4m3fn


def repair_bfloat16_products() -> None:
    """Triton's interpreter multiplies the bits of bfloat16 numbers (up to 3.8.0): convert them."""
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@dataclass
class Paged:
    """A cache and rows of a block table.

    Attributes:
        cache: ``[L, B, Hkv, P, 2 * D]``, a permuted view of its storage; NaN where no row owns the
            block.
        block_table: int32 ``[R, max_blocks]``, a strided view; entries past a row's blocks are 0,
            the null block, which is poisoned too.
    """

    cache: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def random(
        cls,
        blocks: list[int],
        L: int,
        Hkv: int,
        P: int,
        D: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        spare: int = 3,
    ) -> "Paged":
        """A cache in which row `r` owns ``blocks[r]`` blocks, scattered.

        Storage is ``[B, P, L, Hkv, 2 * D]``: no two dimensions are in the order of the view.
        """
        generator = torch.Generator().manual_seed(seed)
        B = 1 + sum(blocks) + spare
        storage = torch.randn(B, P, L, Hkv, 2 * D, generator=generator)
        order = (1 + torch.randperm(B - 1, generator=generator)).tolist()
        width = max(blocks, default=1) + 2
        table = torch.zeros(len(blocks), 2, width, dtype=torch.int32)
        for row, count in enumerate(blocks):
            own, order = order[:count], order[count:]
            table[row, 0, :count] = torch.tensor(own, dtype=torch.int32)
        storage[[0, *order]] = torch.nan
        table[:, 1] = 2**30  # never to be read
        cache = storage.to(dtype).to(DEVICE).permute(2, 0, 3, 1, 4)
        return cls(cache, table.to(DEVICE)[:, 0])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that NaN equals NaN."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.view(kinds[tensor.element_size()])


def head_pages(
    prompt_tokens: list[int], lengths: torch.Tensor, compact_blocks: list[int], P: int
) -> HeadPages:
    """Requests with these kept tokens ``[R, L, Hkv]``, their pages one after the other."""
    pages = -(-lengths // P)
    flat = pages.flatten(1)
    first = (flat.cumsum(1) - flat).reshape(pages.shape)
    return HeadPages(
        torch.tensor(prompt_tokens, dtype=torch.int32, device=DEVICE),
        torch.tensor(compact_blocks, dtype=torch.int32, device=DEVICE),
        lengths.int().to(DEVICE),
        first.int().to(DEVICE),
    )
