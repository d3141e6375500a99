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

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tiny_vlm.grouped_attention  # noqa: F401  (registers the attention)
import torch
import typer
from rich.console import Console
from tiny_vlm.answers import Reader
from tiny_vlm.checkpoint import make_processor, save_checkpoint
from tiny_vlm.glyphs import PATCH
from tiny_vlm.losses import Weights, picture_loss
from tiny_vlm.rows import Batch, Branch, Row, branch, branch_sight, pack_row
from tiny_vlm.training import Trainer, adamw, run, split_weights
from tiny_vlm.vocabulary import BOS, EOS, IMAGE, PAD, USER, VOCAB
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsemm_vllm.commands.evaluate.metrics import Marks
from sparsemm_vllm.data.pictures import (
    EVAL_SEEDS,
    PICTURE_SIZE,
    TRAIN_SEEDS,
    Page,
    make_page,
    make_sample,
    query_sample,
    read_sample,
)

ROOT = Path(__file__).resolve().parent.parent
READER = ROOT / "sparsemm_vllm" / "reader"
STATE = ROOT / ".cache" / "train_reader" / "state.pt"

P = (PICTURE_SIZE // PATCH) ** 2
PREFIX = [BOS, USER, *[IMAGE] * P]
T = 320  # row length: the prefix and the branches
FILLER = string.ascii_letters + string.digits + "     .,"
LABELLED = 0.7  # share of training pages whose lines are KEY value
MAX_GAP = 1500  # largest jump of positions between picture and question

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% else %}<user>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{{ '\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()


def reader_config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=PICTURE_SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=P,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
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


@dataclass(frozen=True)
class Settings:
    """What a training run depends on (with the number of threads, which changes roundings)."""

    steps: int = 2500
    rows: int = 24
    lr: float = 1e-3
    matrix_lr: float = 2e-3
    warmup: int = 150
    decay: float = 0.4  # share of the steps over which the learning rate falls to 0
    weights: Weights = field(default_factory=lambda: Weights(text=0.0))
    seed: int = 0


class ReaderTrainer(Trainer):
    """Float32 master weights, and their bfloat16 copy that computes.

    Muon updates the matrices of the transformer layers, AdamW the rest.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.device = device
        master = LlavaForConditionalGeneration(reader_config()).to(device)
        self.model = LlavaForConditionalGeneration(reader_config()).to(device, torch.bfloat16)
        self.model.set_attn_implementation("grouped")
        self.loss: Callable[..., tuple[Tensor, Tensor]] = torch.compile(picture_loss, dynamic=False)
        matrices, rest = split_weights(master)
        muon = torch.optim.Muon(
            matrices, lr=settings.matrix_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
        )
        optimizers = [
            (muon, settings.matrix_lr),
            (adamw(rest, settings.lr), settings.lr),
        ]
        super().__init__(master, optimizers, settings, settings.steps)
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

    def rate(self) -> float:
        """Linear warm-up, constant, linear decay."""
        s = self.settings
        return min(1.0, (self.step + 1) / s.warmup, (s.steps - self.step) / (s.decay * s.steps))

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
    steps: Annotated[int, typer.Option(help="Training steps in all.")] = Settings.steps,
    rows: Annotated[int, typer.Option(help="Pictures a step.")] = Settings.rows,
    lr: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = Settings.lr,
    matrix_lr: Annotated[float, typer.Option(help="Peak rate of Muon.")] = Settings.matrix_lr,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = Settings.seed,
    threads: Annotated[int, typer.Option(help="CPU threads; only those really free.")] = 1,
    resume: Annotated[bool, typer.Option(help="Continue from the saved state.")] = True,
    state: Annotated[Path, typer.Option(help="Where the state is saved.")] = STATE,
    every: Annotated[int, typer.Option(help="Steps between two saved states.")] = 100,
) -> None:
    """Train the reader; continues where an interrupted run stopped."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(steps=steps, rows=rows, lr=lr, matrix_lr=matrix_lr, seed=seed)
    run(ReaderTrainer(settings, device), state, resume, every, console)


@app.command()
def export(
    state: Annotated[Path, typer.Option(help="Saved training state.")] = STATE,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = READER,
) -> None:
    """Write the checkpoint (float16) from the saved state, and check that it loads."""
    saved = torch.load(state, map_location="cpu")
    model = LlavaForConditionalGeneration(reader_config())
    model.load_state_dict(saved["weights"])
    save_checkpoint(model, make_processor(PICTURE_SIZE, PATCH, CHAT_TEMPLATE), out)
    console.print(f"{out}: step {saved['step']}, {saved['seconds']:.0f} s of training")


# Accuracy.


@app.command(name="eval")
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = READER,
    samples: Annotated[int, typer.Option(help="Held-out pictures a task.")] = 300,
    first: Annotated[int, typer.Option(help="First of the held-out seeds to use.")] = 1000,
    filler: Annotated[int, typer.Option(help="Characters of text before the question.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Greedy generation on held-out pictures: exact words and character errors, in percent.

    The seeds below 1,000 were looked at while the reader was developed: they are left out.
    """
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.bfloat16):
        reader = Reader(model, dtype)
        for task in ("read", "query"):
            held_out = [make_sample(EVAL_SEEDS[first + i], task) for i in range(samples)]
            answers = reader.answer(held_out, filler=filler_text(filler))
            found = Marks.of([sample.answer for sample in held_out], answers).statistics()
            console.print(
                json.dumps(
                    {
                        "task": task,
                        "dtype": str(dtype).removeprefix("torch."),
                        "pictures": samples,
                        "first": first,
                        "filler": filler,
                        "exact_words": round(100 * float(found["exact_words"]), 2),
                        "character_errors": round(100 * float(found["character_errors"]), 2),
                    }
                ),
                soft_wrap=True,
            )


def filler_text(length: int) -> str:
    """Unrelated prose of ``length`` characters, ended by a newline; empty for 0."""
    prose = "The quick brown fox jumps over the lazy dog, then it rests for a while. "
    return (prose * (length // len(prose) + 1))[: length - 1] + "\n" if length else ""


if __name__ == "__main__":
    app()
