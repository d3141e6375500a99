"""Muon in float32: ``torch.optim.Muon`` computes in bfloat16, which is slow on CPUs without it."""

import math

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz polynomial
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest (nearly) orthogonal matrices of ``[N, rows, columns]``. Source: K. Jordan, Muon."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(b * gram, gram, gram, beta=1, alpha=c) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the size of AdamW's steps."""

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                shapes.setdefault(weight.shape, []).append(weight)
        for (rows, columns), weights in shapes.items():
            updates = torch.stack([self._momentum(w, group["momentum"]) for w in weights])
            rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
            for weight, update in zip(weights, orthogonalise(updates), strict=True):
                weight.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=rate)

    def _momentum(self, weight: nn.Parameter, momentum: float) -> Tensor:
        if weight.grad is None:
            raise ValueError("a weight without a gradient has no momentum to update")
        state = self.state[weight]
        buffer = state.setdefault("momentum", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)
