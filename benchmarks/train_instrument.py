"""Train, export, measure and profile the instrument (``benchmarks/instrument``).

    python benchmarks/train_instrument.py train      # resumes from .cache/train_instrument
    python benchmarks/train_instrument.py export     # writes the checkpoint from the saved state
    python benchmarks/train_instrument.py eval       # words exactly right on held-out pictures
    python benchmarks/train_instrument.py profile    # writes benchmarks/instrument/profile.json

A LLaVA model with 64 KV heads on which methods of KV pruning are compared. Its language part learns
text first (`tiny_vlm.prose`), then the whole model learns to read cluttered pictures, as the reader
did (train_reader.py), after a system message of natural text whose loss stays part of the training.
The vision tower starts from the first two layers of the bundled reader's. All in float32, for CPUs
without bfloat16; compiling takes some minutes before the first step of each kind.

Sizes: L layers, H heads (query and KV), D head size, P image tokens, T row length, B rows.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tiny_vlm.blocked_attention  # noqa: F401  (registers the attention)
import torch
import typer
from common import ROOT
from offline.subjects import CONTEXT, SUBJECTS, TASKS
from rich.progress import track
from tiny_vlm.answers import Reader
from tiny_vlm.commands import (
    Folder,
    Rows,
    State,
    Threads,
    add_commands,
    console,
    save_scores,
)
from tiny_vlm.glyphs import PATCH
from tiny_vlm.llava import CHAT_WITH_SYSTEM, image_tokens, llava_config
from tiny_vlm.losses import Weights, picture_loss, text_loss
from tiny_vlm.memory import keep_freed_memory
from tiny_vlm.muon import Muon
from tiny_vlm.prose import excerpt, training_text
from tiny_vlm.rows import Batch, Row, branch, branch_sight, pack_row
from tiny_vlm.training import Settings, Trainer, run
from tiny_vlm.visual_scores import METHOD, concentration, rank_correlation, sample_hits
from tiny_vlm.vocabulary import BOS, IMAGE, USER, encode
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sparsemm_vllm.data.pictures import (
    CLUTTERED_SIZE,
    TRAIN_SEEDS,
    Page,
    make_cluttered_page,
    query_sample,
    read_sample,
)

INSTRUMENT = SUBJECTS["instrument"]
READER = SUBJECTS["reader"].folder
STATE = ROOT / ".cache" / "train_instrument" / "state.pt"

GRID = CLUTTERED_SIZE // PATCH
P = image_tokens(CLUTTERED_SIZE)
T = 448  # row length: the prefix and the branches
TEXT_T = 256  # row length of text without pictures
NO_CONTEXT = 0.1  # share of rows without a system message

SETTINGS = Settings(
    steps=1500,
    rows=12,
    warmup=100,
    decay=0.35,
    weights=Weights(),
    text_steps=160,
    text_rows=32,
)

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def instrument_config() -> LlavaConfig:
    return llava_config(
        CLUTTERED_SIZE,
        vision_layers=2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=16,
    )


@torch.no_grad()
def start_from_reader(model: LlavaForConditionalGeneration) -> None:
    """Copy the reader's vision tower as far as the model's goes; positions are interpolated."""
    reader = LlavaForConditionalGeneration.from_pretrained(READER, dtype=torch.float32)
    trained = dict(reader.model.vision_tower.named_parameters())
    for name, weight in model.model.vision_tower.named_parameters():
        source = trained[name]
        if name.endswith("position_embedding.weight"):
            source = torch.cat([source[:1], spread(source[1:], GRID)])
        weight.copy_(source)


def spread(positions: Tensor, grid: int) -> Tensor:
    """Embeddings of a square grid of positions, ``[side * side, width]``, for another grid."""
    side = round(len(positions) ** 0.5)
    image = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
    wider = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=True)
    return wider[0].flatten(1).T


# Training rows.


def make_batch(step: int, rows: int) -> Batch:
    """The rows of a training step, a pure function of the step."""
    rng = np.random.default_rng([step, rows])
    pages = [make_cluttered_page(TRAIN_SEEDS[step * rows + i]) for i in range(rows)]
    return Batch.of([make_row(rng, page) for page in pages], pages)


def make_row(rng: np.random.Generator, page: Page) -> Row:
    """A system message, whose text is learned too, the picture, and questions about it."""
    length = 0 if rng.random() < NO_CONTEXT else int(rng.integers(*CONTEXT))
    context = encode(excerpt(training_text(), rng, length)) if length else []
    lines = rng.permutation(len(page.lines))
    samples = [read_sample(page), *(query_sample(page, i) for i in lines)]
    prefix = [BOS, *context, USER, *[IMAGE] * P]
    row = pack_row(prefix, len(context) + 2, map(branch, samples), T)
    row.labels[: len(context)] = context
    return row


def make_text(step: int, rows: int) -> Tensor:
    """Ids of excerpts, ``[rows, TEXT_T + 1]``, a pure function of the step."""
    rng = np.random.default_rng([step, rows, 1])
    texts = [excerpt(training_text(), rng, TEXT_T) for _ in range(rows)]
    return torch.tensor([[BOS, *encode(text)] for text in texts])


# Training.


class InstrumentTrainer(Trainer):
    """Text first, then pictures. Muon updates the layers' matrices, AdamW the rest."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.model = LlavaForConditionalGeneration(instrument_config())
        self.model.set_attn_implementation({"text_config": "blocked", "vision_config": "sdpa"})
        start_from_reader(self.model)
        super().__init__(self.model, Muon, settings)
        compiled = Callable[..., tuple[Tensor, Tensor]]
        self.text_loss: compiled = torch.compile(text_loss, dynamic=False)
        self.picture_loss: compiled = torch.compile(picture_loss, dynamic=False)

    def gradients(self) -> Tensor:
        s = self.settings
        if self.step < s.text_steps:
            mask = torch.ones(TEXT_T, TEXT_T).tril().expand(s.text_rows, 1, -1, -1)
            loss, figures = self.text_loss(self.model, make_text(self.step, s.text_rows), mask)
        else:
            batch = make_batch(self.step - s.text_steps, s.rows)
            mask = branch_sight(batch.segments).float()[:, None]
            loss, figures = self.picture_loss(self.model, batch, mask, s.weights)
        loss.backward()
        return figures


@app.command()
def train(
    steps: Annotated[int, typer.Option(help="Steps with pictures.")] = SETTINGS.steps,
    text_steps: Annotated[int, typer.Option(help="Steps with text.")] = SETTINGS.text_steps,
    rows: Rows = SETTINGS.rows,
    query: Annotated[
        float, typer.Option(help="Weight of the answers about single lines.")
    ] = Weights.query,
    threads: Threads = 1,
    state: State = STATE,
) -> None:
    """Train the instrument; continues where an interrupted run stopped."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    asked = {"steps": steps, "text_steps": text_steps, "rows": rows}
    settings = replace(SETTINGS, **asked, weights=Weights(query=query))
    run(InstrumentTrainer(settings), state, console)


add_commands(app, INSTRUMENT, STATE, instrument_config(), CHAT_WITH_SYSTEM, (torch.float32,))


# Visual-head scores.


@app.command()
def profile(
    model: Folder = INSTRUMENT.folder,
    out: Annotated[Path, typer.Option(help="The head profile to write.")] = INSTRUMENT.profile,
    samples: Annotated[int, typer.Option(help="Samples, half of them of each task.")] = 400,
    first: Annotated[int, typer.Option(help="First of the profile seeds to use.")] = 0,
    threads: Threads = 1,
) -> None:
    """Score the query heads on pictures used for neither training nor accuracy."""
    torch.set_num_threads(threads)
    reader = Reader(model, torch.float32, attention="eager")
    hits: list[Tensor] = []
    for task in TASKS:
        asked = INSTRUMENT.for_scores(first, samples // 2, task)
        pairs = zip(asked.samples, asked.contexts or [], strict=True)
        hits += [sample_hits(reader, *pair) for pair in track([*pairs], task)]
    scores = torch.stack(hits).mean(0)
    save_scores(
        scores,
        reader.model.config,
        out,
        model_id="sparsemm-instrument",
        mode="forced",
        data="sparsemm_vllm.pictures, cluttered, PROFILE_SEEDS, tasks read and query",
        samples=len(hits),
        seed=first,
        split_half=rank_correlation(*(torch.stack(hits[half::2]).mean(0) for half in range(2))),
        provenance={"method": METHOD, "tool": "benchmarks/train_instrument.py profile"},
    )
    for heads, share in concentration(scores).items():
        console.print(f"top {heads} of heads: {share:.1%} of the score")


if __name__ == "__main__":
    app()
