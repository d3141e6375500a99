"""A training run that can be stopped and resumed."""

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sparsemm_vllm.files import write_whole

from .losses import FIGURES, Weights

LOG_EVERY, SAVE_EVERY = 20, 50  # steps


@dataclass(frozen=True)
class Settings:
    """What a training run depends on (with the number of threads, which changes roundings).

    Attributes:
        steps: number of steps with pictures.
        rows: pictures a step.
        warmup: steps over which the learning rate rises, of text and of pictures.
        decay: share of `steps` over which the learning rate falls to 0.
        weights: weights of the parts of the loss.
        text_steps: number of steps with text, before those with pictures.
        text_rows: rows of text a step.
        lr: peak rate of AdamW.
        matrix_lr: peak rate of Muon.
        seed: seed of the initial weights.
    """

    steps: int
    rows: int
    warmup: int
    decay: float
    weights: Weights
    text_steps: int = 0
    text_rows: int = 0
    lr: float = 1e-3
    matrix_lr: float = 2e-3
    seed: int = 0


class Trainer:
    """Float32 weights, their optimizers, and where the run is. Subclasses say what a step learns.

    Muon updates the matrices of the transformer layers, AdamW the rest.

    Args:
        weights: model whose weights are trained and saved.
        muon: class of Muon.
        settings: values that the run depends on; they are saved with the state.
    """

    def __init__(
        self, weights: nn.Module, muon: Callable[..., torch.optim.Optimizer], settings: Settings
    ) -> None:
        matrices, rest = split_weights(weights)
        self.weights = weights
        adamw = torch.optim.AdamW(rest, settings.lr, (0.9, 0.98), weight_decay=0.0, fused=True)
        self.optimizers = [
            (muon(matrices, lr=settings.matrix_lr, weight_decay=0.02), settings.matrix_lr),
            (adamw, settings.lr),
        ]
        self.settings = settings
        self.steps = settings.text_steps + settings.steps
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    def gradients(self) -> Tensor:
        """Leave this step's gradients in the weights; returns `FIGURES`."""
        raise NotImplementedError

    def rate(self) -> float:
        """Share of the peak learning rate: linear warm-ups, constant, linear decay."""
        s = self.settings
        since = self.step if self.step < s.text_steps else self.step - s.text_steps
        return min(1.0, (since + 1) / s.warmup, (self.steps - self.step) / (s.decay * s.steps))

    def updated(self) -> None:
        """Called whenever the weights have changed."""

    def train_step(self) -> dict[str, float]:
        start = time.perf_counter()
        figures = self.gradients()
        nn.utils.clip_grad_norm_(self.weights.parameters(), 1.0)
        for optimizer, peak in self.optimizers:
            optimizer.param_groups[0]["lr"] = peak * self.rate()
            optimizer.step()
            optimizer.zero_grad()
        self.updated()
        self.step += 1
        self.seconds += time.perf_counter() - start
        return dict(zip(FIGURES, figures.tolist(), strict=True))

    def save(self, path: Path) -> None:
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "weights": self.weights.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(path, content.getvalue())

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu")
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.weights.load_state_dict(state["weights"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.updated()


def run(trainer: Trainer, state: Path, console: Console) -> None:
    """Train to the end, with a progress bar; saves the state now and then, and goes on from it."""
    if state.exists():
        trainer.load(state)
        console.print(f"resuming at step {trainer.step}")
    left = range(trainer.step, trainer.steps)
    recent: list[dict[str, float]] = []
    for _ in track(left, "train", trainer.steps, trainer.step, console=console):
        recent.append(trainer.train_step())
        if trainer.step % LOG_EVERY == 0:
            trainer.history.append(_log_entry(trainer, recent))
            console.print(json.dumps(trainer.history[-1]), soft_wrap=True)
            recent = []
        if trainer.step % SAVE_EVERY == 0 or trainer.step == trainer.steps:
            trainer.save(state)


def split_weights(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the transformer layers, and the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if ".layers." in name and weight.ndim == 2 else rest).append(weight)
    return matrices, rest


def _log_entry(trainer: Trainer, recent: list[dict[str, float]]) -> dict[str, float]:
    means = {name: float(np.mean([entry[name] for entry in recent])) for name in recent[0]}
    rounded = {name: round(mean, 4) for name, mean in means.items()}
    return {"step": trainer.step, "seconds": round(trainer.seconds), **rounded}
