"""What the commands of both training scripts have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile, save_profile
from sparsemm_vllm.commands.evaluate.metrics import Marks

from .checkpoint import make_processor, save_checkpoint
from .glyphs import PATCH

console = Console()

Threads = Annotated[int, typer.Option(help="CPU threads; only those really free.")]
Rows = Annotated[int, typer.Option(help="Pictures a step.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights.")]
Resume = Annotated[bool, typer.Option(help="Continue from the saved state.")]
State = Annotated[Path, typer.Option(help="Where the state is saved.")]
Every = Annotated[int, typer.Option(help="Steps between two saved states.")]
Folder = Annotated[Path, typer.Option(help="Folder of the checkpoint.")]
Pictures = Annotated[int, typer.Option(help="Held-out pictures a task.")]
First = Annotated[int, typer.Option(help="First of the held-out seeds to use.")]


def export_state(config: LlavaConfig, chat_template: str, state: Path, out: Path) -> None:
    """Write the checkpoint (float16) of a saved training state, and check that it loads."""
    saved = torch.load(state, map_location="cpu")
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict(saved["weights"])
    side = config.vision_config.image_size
    save_checkpoint(model, make_processor(side, PATCH, chat_template), out)
    console.print(f"{out}: step {saved['step']}, {saved['seconds']:.0f} s of training")


def print_marks(truths: Sequence[str], answers: Sequence[str], **about: Any) -> None:
    """Print exact words and character errors, in percent, as a line of JSON.

    Args:
        truths: true answers.
        answers: answers of the model.
        about: values that say what was asked, by name.
    """
    found = Marks.of(list(truths), list(answers)).statistics()
    percent = {k: round(100 * float(found[k]), 2) for k in ("exact_words", "character_errors")}
    console.print(json.dumps(about | percent), soft_wrap=True)


def save_scores(scores: torch.Tensor, config: LlavaConfig, path: Path, **known: Any) -> HeadProfile:
    """Write the head profile of a model.

    Args:
        scores: scores of the query heads, ``[L, Hq]``.
        config: configuration of the model.
        path: file of the profile.
        known: other fields of the profile.
    """
    text = config.text_config
    profile = HeadProfile(
        num_layers=text.num_hidden_layers,
        num_query_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        config_hash=config_hash(config),
        scores=tuple(tuple(round(score, 6) for score in layer) for layer in scores.tolist()),
        **known,
    )
    save_profile(profile, path)
    return profile
