"""A platform without a GPU, for the vLLM wheel that is built for CUDA.

vLLM asks for its platform before most of its modules are there, so what needs those is imported
when a backend is chosen.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from typing_extensions import override
from vllm.platforms.cpu import CpuPlatform

from sparsemm_vllm.names import CPU_BACKEND, NAME

DENSE_BACKEND = "sparsemm_vllm.engine.cpu.attention.TorchAttentionBackend"
BLOCK_SIZE = 16  # vLLM's default on CUDA; its CPU kernels, which are not in this wheel, prefer 128


class SparseMMCpuPlatform(CpuPlatform):
    """vLLM's CPU platform with torch operators, torch attention and interpreted Triton."""

    @classmethod
    @override
    def import_kernels(cls) -> None:
        """Define the few operators that models call in torch: the wheel has none for the CPU."""
        define_operators()

    @classmethod
    @override
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """SPARSEMM if asked for, else dense attention in torch; vLLM's CPU attention is not there.

        Raises:
            ValueError: for a layer that the backend does not support.
        """
        from vllm.utils.import_utils import resolve_obj_by_qualname

        from sparsemm_vllm.engine.cpu import model_runner as cpu_runner

        cpu_runner.install()
        chosen = getattr(selected_backend, "name", None) == NAME
        path = CPU_BACKEND if chosen else DENSE_BACKEND
        backend = resolve_obj_by_qualname(path)
        reasons = backend.validate_configuration(
            **attn_selector_config._asdict(), device_capability=None
        )
        if reasons:
            raise ValueError(
                f"attention backend {backend.get_name()} is not valid for this configuration: "
                + "; ".join(reasons)
            )
        return path

    @classmethod
    @override
    def check_and_update_config(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        """As vLLM's for the CPU, with its default block size on CUDA and no compiled kernels.

        A single worker runs in the engine's process: one of its own would only be bound to cores,
        and import vLLM once more, which takes half of a server's start.
        """
        super().check_and_update_config(vllm_config, *args, **kwargs)
        parallel_config = vllm_config.parallel_config
        processes = parallel_config.distributed_executor_backend == "mp"
        if processes and parallel_config.world_size_across_dp == 1:
            parallel_config.distributed_executor_backend = "uni"
        _set_default_block_size(vllm_config)
        vllm_config.compilation_config.custom_ops = ["none"]

    @classmethod
    @override
    def update_block_size_for_backend(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which since 0.33 puts its own default there when it knows the backends."""
        super().update_block_size_for_backend(vllm_config, *args, **kwargs)
        model = vllm_config.model_config
        if model is not None and not model.is_hybrid:  # those have blocks as large as a state
            _set_default_block_size(vllm_config)


def _set_default_block_size(vllm_config: Any) -> None:
    cache_config = vllm_config.cache_config
    if not cache_config.user_specified_block_size:
        cache_config.block_size = BLOCK_SIZE


def _gelu_quick(out: torch.Tensor, x: torch.Tensor) -> None:
    out.copy_(x * torch.sigmoid(1.702 * x))


def _silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    gate, up = x.chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def _weight_packed_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_packed: bool,
) -> None:
    out.copy_(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))


def _prepack_moe_weight(weight: torch.Tensor, output: torch.Tensor, isa: str) -> None:
    output.copy_(weight)


def _cpu_fused_moe(
    out: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    skip_weighted: bool,
    act: str,
    isa: str,
) -> None:
    if act != "silu":
        raise NotImplementedError(f"experts with the activation {act}")
    out.zero_()
    for expert in topk_ids.unique().tolist():
        row, choice = (topk_ids == expert).nonzero(as_tuple=True)
        bias = None if w13_bias is None else w13_bias[expert]
        gate, up = F.linear(x[row], w13[expert], bias).chunk(2, -1)
        bias = None if w2_bias is None else w2_bias[expert]
        y = F.linear(F.silu(gate) * up, w2[expert], bias)
        weight = 1 if skip_weighted else topk_weights[row, choice, None]
        out.index_add_(0, row, (y * weight).to(out.dtype))


OPERATORS: dict[str, Callable[..., Any]] = {
    "init_cpu_memory_env(int[] nodes) -> ()": lambda nodes: None,
    "gelu_quick(Tensor! out, Tensor x) -> ()": _gelu_quick,
    "silu_and_mul(Tensor! out, Tensor x) -> ()": _silu_and_mul,
    # What vLLM takes for small bf16 layers on processors with AMX.
    "convert_weight_packed(Tensor weight) -> Tensor": torch.clone,
    "weight_packed_linear(Tensor! out, Tensor x, Tensor weight, Tensor? bias, bool is_packed)"
    " -> ()": _weight_packed_linear,
    "prepack_moe_weight(Tensor weight, Tensor! output, str isa) -> ()": _prepack_moe_weight,
    "cpu_fused_moe(Tensor! out, Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias,"
    " Tensor topk_weights, Tensor topk_ids, bool skip_weighted, str act, str isa)"
    " -> ()": _cpu_fused_moe,
}
_LIBRARY = torch.library.Library("_C", "FRAGMENT")


def define_operators() -> None:
    """Define in torch the `torch.ops._C` operators that the wheel lacks without a GPU. Idempotent.

    Everything else runs in vLLM's native torch code (`custom_ops=["none"]`).
    """
    for schema, function in OPERATORS.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops._C, name):
            _LIBRARY.define(schema)
            _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
