"""What the workers of an expert-parallel engine load on the CPU.

vLLM's experts on the CPU are given the experts of the whole model and ignore the map to those of
their own rank, which GPUs follow: a rank would look for weights that it does not have.
"""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

fused_moe = cpu_moe.CPUUnquantizedExperts.apply


def apply(
    self: cpu_moe.CPUUnquantizedExperts,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    expert_map: torch.Tensor | None,
    **kwargs: object,
) -> None:
    """As vLLM's, of the experts that this rank has."""
    if expert_map is not None:
        own = expert_map[topk_ids.long()]
        topk_weights = topk_weights * (own >= 0)
        topk_ids = own.clamp(min=0).to(topk_ids.dtype)
    arguments = output, hidden_states, w1, w2, topk_weights, topk_ids
    fused_moe(self, *arguments, expert_map=None, **kwargs)


cpu_moe.CPUUnquantizedExperts.apply = apply


class LocalExperts:
    """Lets a test look at a rank's experts (`worker_extension_cls`)."""

    model_runner: Any

    def local_experts(self) -> list[tuple[int, ...]]:
        """Shape of the first weights of each layer's experts."""
        names = self.model_runner.model.named_parameters()
        return [tuple(w.shape) for name, w in names if name.endswith("w13_weight")]
