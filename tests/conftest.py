"""Tests never reach the network, and need no GPU where there is none."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from sparsemm_vllm import environment

os.environ["HF_HUB_OFFLINE"] = "1"
if not environment.has_gpu():
    environment.use_cpu()

hypothesis.settings.register_profile("shared machine", deadline=None)  # others take CPU time too
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_products() -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bfloat16 numbers (up to 3.7.1): convert them."""
    if environment.has_gpu():
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield
