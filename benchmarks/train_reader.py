"""Train, export and measure the bundled reader (``sparsemm_vllm/reader``).

    python benchmarks/train_reader.py train      # resumes from .cache/train_reader if interrupted
    python benchmarks/train_reader.py export     # writes the checkpoint from the saved state
    python benchmarks/train_reader.py eval       # words exactly right on held-out pictures

The reader is a LLaVA model (CLIP vision tower, Llama language model) trained from scratch on the
pictures of ``sparsemm_vllm.data.pictures``. Three things make it learn on one CPU core in less than
an hour and a half:

* an auxiliary loss: the language model's own logits at the image tokens must name the glyph that
  the token's patch shows (a blank patch says "space", with a small weight);
* several questions share one picture: they are branches of one row, which see the picture and
  themselves but not each other (attention mask), with positions as if each came alone;
* bfloat16 compute with float32 master weights, and attention as two batched products per KV head.

Sizes: L layers, Hq query heads, Hkv KV heads, D head size, P image tokens, T row length, B rows.
"""

import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated

import numpy as np
import tiny_vlm.grouped_attention  # noqa: F401  (registers the attention)
import torch
import typer
from common import ROOT
from offline.subjects import SUBJECTS
from tiny_vlm.commands import Rows, State, Threads, add_commands, console
from tiny_vlm.llava import CHAT, image_tokens, llava_config
from tiny_vlm.losses import Weights, picture_loss
from tiny_vlm.rows import Batch, Branch, Row, branch, branch_sight, pack_row
from tiny_vlm.training import Settings, Trainer, run
from tiny_vlm.vocabulary import BOS, IMAGE, USER
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sparsemm_vllm.data.pictures import (
    PICTURE_SIZE,
    TRAIN_SEEDS,
    Page,
    make_page,
    query_sample,
    read_sample,
)

READER = SUBJECTS["reader"]
STATE = ROOT / ".cache" / "train_reader" / "state.pt"

P = image_tokens(PICTURE_SIZE)
PREFIX = [BOS, USER, *[IMAGE] * P]
T = 320  # row length: the prefix and the branches
FILLER = string.ascii_letters + string.digits + "     .,"
LABELLED = 0.7  # share of training pages whose lines are KEY value
MAX_GAP = 1500  # largest jump of positions between picture and question

SETTINGS = Settings(steps=2500, rows=24, warmup=150, decay=0.4, weights=Weights(text=0.0))
MUON = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def reader_config() -> LlavaConfig:
    return llava_config(
        PICTURE_SIZE,
        vision_layers=3,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )


# Training rows.


def make_batch(step: int, rows: int) -> Batch:
    """The rows of a training step, a pure function of the step."""
    rng = np.random.default_rng([step, rows])
    seeds = [TRAIN_SEEDS[step * rows + i] for i in range(rows)]
    pages = [make_page(seed, labelled=bool(rng.random() < LABELLED)) for seed in seeds]
    return Batch.of([make_row(rng, page) for page in pages], pages)


def make_row(rng: np.random.Generator, page: Page) -> Row:
    gap = int(rng.integers(MAX_GAP)) if rng.random() < 0.5 else 0
    return pack_row(PREFIX, 2, page_branches(rng, page), T, gap)


def page_branches(rng: np.random.Generator, page: Page) -> Iterator[Branch]:
    """Questions of a page: read all of it, then single lines.

    In one page of six only one question is asked, after unrelated text that fills the row.
    """
    asked = [i for i, line in enumerate(page.lines) if len(line) > 1]
    samples = [read_sample(page), *(query_sample(page, i) for i in rng.permutation(asked))]
    if rng.random() < 1 / 6:
        sample = samples[rng.integers(len(samples))]
        room = T - len(PREFIX) - len(sample.question) - len(sample.answer) - 4
        noise = rng.integers(len(FILLER), size=rng.integers(room))
        samples = [sample]
        filler = "".join(FILLER[i] for i in noise) + "\n"
    else:
        filler = ""
    for sample in samples:
        yield branch(sample, filler)


# Training.


class ReaderTrainer(Trainer):
    """Float32 master weights, and their bfloat16 copy that computes."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.device = device
        master = LlavaForConditionalGeneration(reader_config()).to(device)
        self.model = LlavaForConditionalGeneration(reader_config()).to(device, torch.bfloat16)
        self.model.set_attn_implementation("grouped")
        self.loss: Callable[..., tuple[Tensor, Tensor]] = torch.compile(picture_loss, dynamic=False)
        super().__init__(master, MUON, settings)
        self.updated()

    def gradients(self) -> Tensor:
        batch = make_batch(self.step, self.settings.rows).to(self.device)
        mask = branch_mask(batch.segments, self.model.dtype)  # here, or it is fused and redone
        loss, figures = self.loss(self.model, batch, mask, self.settings.weights)
        loss.backward()
        for copy, weight in zip(self.model.parameters(), self.weights.parameters(), strict=True):
            weight.grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None
        return figures

    @torch.no_grad()
    def updated(self) -> None:
        for copy, weight in zip(self.model.parameters(), self.weights.parameters(), strict=True):
            copy.copy_(weight)


def branch_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[B, 1, T, T]`` of `branch_sight`."""
    lowest = torch.finfo(dtype).min
    return torch.where(branch_sight(segments), 0.0, lowest).to(dtype)[:, None]


@app.command()
def train(
    steps: Annotated[int, typer.Option(help="Training steps in all.")] = SETTINGS.steps,
    rows: Rows = SETTINGS.rows,
    threads: Threads = 1,
    state: State = STATE,
) -> None:
    """Train the reader; continues where an interrupted run stopped."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = replace(SETTINGS, steps=steps, rows=rows)
    run(ReaderTrainer(asked, device), state, console)


add_commands(app, READER, STATE, reader_config(), CHAT, (torch.float32, torch.bfloat16))

if __name__ == "__main__":
    app()
