"""Train, export, measure and profile the bundled reader (``sparsemm_vllm/reader``).

    python benchmarks/train_reader.py train      # resumes from .cache/train_reader if interrupted
    python benchmarks/train_reader.py export     # writes the checkpoint from the saved state
    python benchmarks/train_reader.py eval       # words exactly right on held-out pictures
    python benchmarks/train_reader.py profile    # writes head_profiles/sparsemm-reader.json

The reader is a LLaVA model (CLIP vision tower, Llama language model) trained from scratch on the
pictures of ``sparsemm_vllm.pictures``. Three things make it learn on one CPU core in less than an
hour and a half:

* an auxiliary loss: the language model's own logits at the image tokens must name the glyph that
  the token's patch shows (a blank patch says "space", with a small weight);
* several questions share one picture: they are branches of one row, which see the picture and
  themselves but not each other (attention mask), with positions as if each came alone;
* bfloat16 compute with float32 master weights, and attention as two batched products per KV head.

Sizes: L layers, Hq query heads, Hkv KV heads, D head size, P image tokens, T row length, B rows.
"""

from __future__ import annotations

import datetime
import json
import os
import string
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsemm_vllm.pictures import (
    EVAL_SEEDS,
    PICTURE_SIZE,
    PROFILE_SEEDS,
    TRAIN_SEEDS,
    Box,
    Page,
    Sample,
    Task,
    make_page,
    make_sample,
    query_sample,
    read_sample,
)

ROOT = Path(__file__).resolve().parent.parent
READER = ROOT / "sparsemm_vllm" / "reader"
PROFILE = ROOT / "head_profiles" / "sparsemm-reader.json"
STATE = ROOT / ".cache" / "train_reader" / "state.pt"

PATCH = 16  # pixels a side
GRID = PICTURE_SIZE // PATCH  # patches a side
P = GRID * GRID
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
CHARACTERS = string.printable[:95] + "\n"
VOCAB = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
BLANK = VOCAB[" "]
IGNORE = -100  # label of a position without a loss
PREFIX = 2 + P  # <s> <user> and the image tokens
T = 320  # row length: the prefix and the branches
FILLER = string.ascii_letters + string.digits + "     .,"
LABELLED = 0.7  # share of training pages whose lines are KEY value
MAX_GAP = 1500  # largest jump of positions between picture and question
FIGURES = ("loss", "glyph_loss", "accuracy", "glyphs")  # of a training step
MIN_OVERLAP = 24  # square pixels of a glyph's box that make a patch more than blank

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


# The model and its processor.


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


def reader_processor() -> LlavaProcessor:
    """One token a character; pictures of the native size are only rescaled to -1..1."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    images = CLIPImageProcessor(
        size={"shortest_edge": PICTURE_SIZE},
        crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@torch.library.custom_op("sparsemm_reader::row_softmax", mutates_args=())
def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, kept out of the compiler, which makes it slower."""
    return scores.softmax(-1)


@softmax.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores)


def _keep_weights(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _softmax_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (weights,) = ctx.saved_tensors
    weighted = grad * weights
    return weighted - weights * weighted.sum(-1, keepdim=True)


softmax.register_autograd(_softmax_gradient, setup_context=_keep_weights)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as two batched products, the queries of a KV head stacked.

    ``query [B, Hq, T, D]``, ``key`` and ``value [B, Hkv, T, D]``, additive ``attention_mask``
    broadcast over heads; returns ``[B, T, Hq, D]``. On a CPU its backward is several times as fast
    as that of the fused kernel.
    """
    b, hq, t, d = query.shape
    groups = b * key.shape[1]
    stacked = (query * scaling).reshape(groups, -1, d)
    scores = torch.bmm(stacked, key.reshape(groups, t, d).transpose(1, 2)).view(b, hq, t, t)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = softmax(scores).view(groups, -1, t)
    out = torch.bmm(weights, value.reshape(groups, t, d)).view(b, hq, t, d)
    return out.transpose(1, 2).contiguous(), None


# Training rows.


@dataclass(frozen=True)
class Batch:
    """``ids``, ``labels``, ``positions``, ``segments [B, T]``; ``glyphs [B, P]``; pixels NCHW."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    glyphs: Tensor
    pixels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def encode(text: str) -> list[int]:
    return [VOCAB[character] for character in text]


def make_batch(step: int, rows: int) -> Batch:
    """The rows of a training step, a pure function of the step."""
    rng = np.random.default_rng([step, rows])
    seeds = [TRAIN_SEEDS[step * rows + i] for i in range(rows)]
    pages = [make_page(seed, labelled=bool(rng.random() < LABELLED)) for seed in seeds]
    fields = [np.stack(field) for field in zip(*(make_row(rng, p) for p in pages), strict=True)]
    pixels = np.stack([np.asarray(page.image) for page in pages])
    ids, labels, positions, segments = (torch.from_numpy(field) for field in fields)
    return Batch(
        ids=ids,
        labels=labels,
        positions=positions,
        segments=segments,
        glyphs=torch.from_numpy(np.stack([patch_glyphs(page) for page in pages])),
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1,
    )


def make_row(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, ...]:
    """Token ids, labels (already shifted), positions and segments of one row, ``[T]`` each."""
    ids = np.full(T, PAD)
    labels = np.full(T, IGNORE)
    positions = np.zeros(T, dtype=np.int64)
    segments = np.full(T, -1)
    ids[:PREFIX] = [BOS, USER, *[IMAGE] * P]
    positions[:PREFIX] = np.arange(PREFIX)
    segments[:PREFIX] = 0
    gap = int(rng.integers(MAX_GAP)) if rng.random() < 0.5 else 0
    start = PREFIX
    for branch, (prompt, answer) in enumerate(page_branches(rng, page), 1):
        stop = start + len(prompt) + len(answer)
        if stop > T:
            break
        ids[start:stop] = prompt + answer
        labels[stop - len(answer) - 1 : stop - 1] = answer
        positions[start:stop] = PREFIX + gap + np.arange(stop - start)
        segments[start:stop] = branch
        start = stop
    return ids, labels, positions, segments


def page_branches(rng: np.random.Generator, page: Page) -> Iterator[tuple[list[int], list[int]]]:
    """Questions of a page as ``(prompt ids, answer ids)``: read all of it, then single lines.

    In one page of six only one question is asked, after unrelated text that fills the row.
    """
    asked = [i for i, line in enumerate(page.lines) if len(line) > 1]
    samples = [read_sample(page), *(query_sample(page, i) for i in rng.permutation(asked))]
    if rng.random() < 1 / 6:
        sample = samples[rng.integers(len(samples))]
        room = T - PREFIX - len(sample.question) - len(sample.answer) - 4
        noise = rng.integers(len(FILLER), size=rng.integers(room))
        samples = [sample]
        filler = "".join(FILLER[i] for i in noise) + "\n"
    else:
        filler = ""
    for sample in samples:
        yield [*encode(f"\n{filler}{sample.question}"), ASSISTANT], [*encode(sample.answer), EOS]


def patch_glyphs(page: Page) -> np.ndarray:
    """Token id of the character each patch shows, ``[P]``: the one whose box covers most of it.

    A character that wins no patch takes the one it covers most, unless that is another's only one.
    """
    letters = [VOCAB[letter] for word in page.words for letter in word.text]
    boxes = [box for word in page.words for box in word.char_boxes]
    cover = patch_overlap(boxes).reshape(len(boxes), P)
    owner = np.where(cover.max(0) >= MIN_OVERLAP, cover.argmax(0), -1)
    for i in set(range(len(boxes))) - set(owner.tolist()):
        best = int(cover[i].argmax())
        if owner[best] < 0 or (owner == owner[best]).sum() > 1:
            owner[best] = i
    return np.array([*letters, BLANK])[owner]


def patch_overlap(boxes: list[Box]) -> np.ndarray:
    """Square pixels that each box shares with each patch, ``[boxes, GRID, GRID]`` (y, then x)."""
    edges = np.arange(GRID) * PATCH
    x0, y0, x1, y1 = (np.array(side)[:, None] for side in zip(*boxes, strict=True))
    width = np.clip(np.minimum(x1, edges + PATCH) - np.maximum(x0, edges), 0, None)
    height = np.clip(np.minimum(y1, edges + PATCH) - np.maximum(y0, edges), 0, None)
    return height[:, :, None] * width[:, None, :]


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
    blank_weight: float = 0.1
    glyph_weight: float = 1.0
    query_weight: float = 3.0  # of the answers about single lines, which are short
    seed: int = 0

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: linear warm-up, constant, linear decay."""
        left = (self.steps - step) / (self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """Float32 master weights, their bfloat16 copy that computes, and two optimizers.

    Muon updates the matrices of the transformer layers, AdamW the rest.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = device
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.master = LlavaForConditionalGeneration(reader_config()).to(device)
        self.model = LlavaForConditionalGeneration(reader_config()).to(device, torch.bfloat16)
        self.model.set_attn_implementation("grouped")
        self.optimizers = make_optimizers(self.master, settings)
        self.loss: Callable[..., tuple[Tensor, Tensor]] = torch.compile(branch_loss, dynamic=False)
        self.copy_weights()

    @torch.no_grad()
    def copy_weights(self) -> None:
        for copy, weight in zip(self.model.parameters(), self.master.parameters(), strict=True):
            copy.copy_(weight)

    def train_step(self) -> dict[str, float]:
        start = time.perf_counter()
        batch = make_batch(self.step, self.settings.rows).to(self.device)
        mask = branch_mask(batch.segments, self.model.dtype)  # here, or it is fused and redone
        loss, figures = self.loss(self.model, batch, mask, self.settings)
        loss.backward()
        self.take_gradients()
        rate = self.settings.rate(self.step)
        for optimizer, peak in zip(
            self.optimizers, (self.settings.matrix_lr, self.settings.lr), strict=True
        ):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
        self.copy_weights()
        self.step += 1
        self.seconds += time.perf_counter() - start
        return dict(zip(FIGURES, figures.tolist(), strict=True))

    def take_gradients(self) -> None:
        """Move the gradients to the master weights, and clip their norm to 1."""
        for copy, weight in zip(self.model.parameters(), self.master.parameters(), strict=True):
            weight.grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None
        nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)

    def save(self, path: Path) -> None:
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "weights": self.master.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.master.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.copy_weights()


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, weight in model.named_parameters():
        (matrices if ".layers." in name and weight.ndim == 2 else rest).append(weight)
    return [
        torch.optim.Muon(
            matrices, lr=settings.matrix_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def branch_loss(
    model: LlavaForConditionalGeneration, batch: Batch, mask: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The loss, and (answer loss, glyph loss, answer accuracy, glyph accuracy) for the log."""
    logits = row_logits(model, batch, mask).float()
    answer = batch.labels != IGNORE
    emphasis = answer * torch.where(batch.segments > 1, settings.query_weight, 1.0)
    each = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    loss = (each * emphasis.flatten()).sum() / emphasis.sum()
    right = ((logits.argmax(-1) == batch.labels) & answer).sum() / answer.sum()
    seen = logits[:, 2:PREFIX]
    ink = batch.glyphs != BLANK
    weight = torch.where(ink, 1.0, settings.blank_weight)
    each = F.cross_entropy(seen.flatten(0, 1), batch.glyphs.flatten(), reduction="none")
    glyph_loss = (each * weight.flatten()).sum() / weight.sum()
    glyphs = ((seen.argmax(-1) == batch.glyphs) & ink).sum() / ink.sum()
    figures = torch.stack([loss, glyph_loss, right, glyphs]).detach()
    return loss + settings.glyph_weight * glyph_loss, figures


def row_logits(model: LlavaForConditionalGeneration, batch: Batch, mask: Tensor) -> Tensor:
    """What the stock forward computes, ``[B, T, vocabulary]``, for rows of the training layout."""
    inner = model.model
    features = inner.vision_tower(batch.pixels.to(model.dtype)).last_hidden_state[:, 1:]
    embeddings = inner.language_model.embed_tokens(batch.ids)
    embeddings = torch.cat(
        [embeddings[:, :2], inner.multi_modal_projector(features), embeddings[:, PREFIX:]], 1
    )
    hidden = inner.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)


def branch_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[B, 1, T, T]``: causal, and a branch sees the prefix and itself only."""
    same = segments[:, :, None] == segments[:, None, :]
    shared = segments[:, None, :] == 0
    row = torch.arange(segments.shape[1], device=segments.device)
    seen = (same | shared) & (row[:, None] >= row)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


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
    trainer = Trainer(settings, device)
    if resume and state.exists():
        trainer.load(state)
        console.print(f"resuming at step {trainer.step}")
    with training_progress() as progress:
        task = progress.add_task("train", total=steps, completed=trainer.step, figures="")
        recent: list[dict[str, float]] = []
        while trainer.step < steps:
            recent.append(trainer.train_step())
            progress.update(task, completed=trainer.step, figures=figure_text(recent[-1]))
            if trainer.step % 50 == 0:
                trainer.history.append(log_entry(trainer, recent))
                progress.console.print(json.dumps(trainer.history[-1]), soft_wrap=True)
                recent = []
            if trainer.step % every == 0 or trainer.step == steps:
                trainer.save(state)


def training_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )


def figure_text(figures: dict[str, float]) -> str:
    return f"loss {figures['loss']:.3f} accuracy {figures['accuracy']:.3f}"


def log_entry(trainer: Trainer, recent: list[dict[str, float]]) -> dict[str, float]:
    means = {name: float(np.mean([entry[name] for entry in recent])) for name in recent[0]}
    rounded = {name: round(mean, 4) for name, mean in means.items()}
    return {"step": trainer.step, "seconds": round(trainer.seconds), **rounded}


# The exported checkpoint.


@app.command()
def export(
    state: Annotated[Path, typer.Option(help="Saved training state.")] = STATE,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = READER,
) -> None:
    """Write the checkpoint (float16) from the saved state, and check that it loads."""
    saved = torch.load(state, map_location="cpu")
    model = LlavaForConditionalGeneration(reader_config())
    model.load_state_dict(saved["weights"])
    save_checkpoint(model, out)
    console.print(f"{out}: step {saved['step']}, {saved['seconds']:.0f} s of training")


def save_checkpoint(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Save model and processor to ``out``, file by file in one move each.

    transformers 5 leaves ``vision_model.`` out of the tower's weight names, vLLM expects it;
    transformers loads both.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        model.to(torch.float16).save_pretrained(folder)
        reader_processor().save_pretrained(folder)
        weights = folder / "model.safetensors"
        tensors = {vllm_name(key): tensor for key, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        for file in folder.iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)
    _, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    faults = {name: keys for name, keys in info.items() if keys}
    if faults:
        raise ValueError(f"{out} does not load cleanly: {faults}")


def vllm_name(key: str) -> str:
    tower = "vision_tower."
    return key.replace(tower, f"{tower}vision_model.") if "vision_model." not in key else key


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
            words, characters = score_answers(held_out, reader.answer(held_out, filler))
            console.print(
                json.dumps(
                    {
                        "task": task,
                        "dtype": str(dtype).removeprefix("torch."),
                        "pictures": samples,
                        "first": first,
                        "filler": filler,
                        "exact_words": round(100 * words, 2),
                        "character_errors": round(100 * characters, 2),
                    }
                ),
                soft_wrap=True,
            )


class Reader:
    """The exported checkpoint in stock transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> None:
        self.processor = LlavaProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        ).eval()

    def inputs(self, samples: list[Sample], answers: bool = False, filler: int = 0) -> Any:
        """Model inputs for the samples' chats, padded on the left, with or without answers."""
        texts = [self.prompt(f"{filler_text(filler)}{sample.question}") for sample in samples]
        if answers:
            texts = [f"{t}{s.answer}</s>" for t, s in zip(texts, samples, strict=True)]
        images = [sample.image for sample in samples]
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.model.dtype)

    def prompt(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True)

    @torch.no_grad()
    def answer(self, samples: list[Sample], filler: int = 0, rows: int = 50) -> list[str]:
        """Greedy answers, generated ``rows`` samples at a time."""
        texts: list[str] = []
        for start in range(0, len(samples), rows):
            inputs = self.inputs(samples[start : start + rows], filler=filler)
            ids = self.model.generate(**inputs, max_new_tokens=72, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            texts += self.processor.batch_decode(new, skip_special_tokens=True)
        return texts


def filler_text(length: int) -> str:
    """Unrelated prose of ``length`` characters, ended by a newline; empty for 0."""
    prose = "The quick brown fox jumps over the lazy dog, then it rests for a while. "
    return (prose * (length // len(prose) + 1))[: length - 1] + "\n" if length else ""


def score_answers(samples: list[Sample], answers: list[str]) -> tuple[float, float]:
    """Share of words that are exactly right in their place, and character errors per character."""
    right = words = errors = characters = 0
    for sample, answer in zip(samples, answers, strict=True):
        truth = sample.answer.split(" ")
        words += len(truth)
        right += sum(a == b for a, b in zip(truth, answer.split(" "), strict=False))
        errors += edit_distance(sample.answer, answer)
        characters += len(sample.answer)
    return right / words, errors / characters


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


# Visual-head scores.


@app.command()
def profile(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = READER,
    out: Annotated[Path, typer.Option(help="The head profile to write.")] = PROFILE,
    samples: Annotated[int, typer.Option(help="Samples, half of them of each task.")] = 400,
    seed: Annotated[int, typer.Option(help="First sample of the profile seeds.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Score the query heads on pictures used for neither training nor accuracy."""
    torch.set_num_threads(threads)
    reader = Reader(model, torch.float32, attention="eager")
    tasks: tuple[Task, Task] = ("read", "query")
    hits = [
        sample_hits(reader, make_sample(PROFILE_SEEDS[seed + i], tasks[i % 2]))
        for i in range(samples)
    ]
    scores = torch.stack(hits).mean(0)
    text = reader.model.config.text_config
    document = {
        "schema_version": 1,
        "model_id": "sparsemm-reader",
        "num_layers": text.num_hidden_layers,
        "num_query_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "provenance": {
            "method": "For every answer token of a word, a query head whose largest attention "
            "weight, in the row that predicts the token, falls on an image token inside the word's "
            "box scores 1 / (image tokens in the box); the score is the mean over samples of the "
            "sum of hits.",
            "data": "sparsemm_vllm.pictures, PROFILE_SEEDS, tasks read and query in turn, "
            "teacher-forced true answers, float32",
            "samples": samples,
            "seed": seed,
            "tool": "benchmarks/train_reader.py profile",
            "date": datetime.date.today().isoformat(),
        },
        "scores": [[round(score, 6) for score in layer] for layer in scores.tolist()],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print_concentration(scores.flatten())


@torch.no_grad()
def sample_hits(reader: Reader, sample: Sample) -> Tensor:
    """Sum over the answer's tokens of ``1 / (image tokens in the word's box)``, ``[L, Hq]``."""
    inputs = reader.inputs([sample], answers=True)
    ids = inputs["input_ids"][0]
    image = int((ids == IMAGE).nonzero()[0])
    words = [sample.words[i] for i in sample.answer_words]  # the answer's, in its order
    inside = torch.from_numpy(patch_overlap([w.box for w in words]).reshape(len(words), P) > 0)
    rows, owners = word_rows([w.text for w in words], len(ids) - len(sample.answer) - 2)
    attentions = torch.stack(reader.model(**inputs, output_attentions=True).attentions)
    top = attentions[:, 0, :, rows].argmax(-1) - image  # [L, Hq, answer tokens]
    on_image = (top >= 0) & (top < P)
    hit = on_image & inside[owners, top.clamp(0, P - 1)]
    return (hit / inside.sum(1)[owners]).sum(-1)


def word_rows(words: list[str], start: int) -> tuple[Tensor, Tensor]:
    """Rows that predict the characters of the answer's words, and the word each belongs to.

    ``start`` is the row that predicts the answer's first character; words are a space apart.
    """
    rows: list[int] = []
    owners: list[int] = []
    for i, word in enumerate(words):
        rows += range(start, start + len(word))
        owners += [i] * len(word)
        start += len(word) + 1
    return torch.tensor(rows), torch.tensor(owners)


def print_concentration(scores: Tensor) -> None:
    """Share of the whole score that the best heads hold."""
    ranked = scores.sort(descending=True).values
    for percent in (5, 10, 20):
        heads = max(1, round(len(ranked) * percent / 100))
        share = 100 * float(ranked[:heads].sum() / ranked.sum())
        console.print(f"top {percent:2} % of heads ({heads}): {share:.1f} % of the score")


ALL_ATTENTION_FUNCTIONS.register("grouped", grouped_attention)

if __name__ == "__main__":
    app()
