"""What the commands of both training scripts have in common."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from offline.subjects import TASKS, Subject
from rich.console import Console
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile, save_profile
from sparsemm_vllm.commands.evaluate.metrics import Marks

from .answers import Reader
from .checkpoint import make_processor, save_checkpoint
from .glyphs import PATCH

console = Console()

Threads = Annotated[int, typer.Option(help="CPU threads; only those really free.")]
Rows = Annotated[int, typer.Option(help="Pictures a step.")]
State = Annotated[Path, typer.Option(help="Where the state is saved.")]
Folder = Annotated[Path, typer.Option(help="Folder of the checkpoint.")]


def add_commands(
    app: typer.Typer,
    subject: Subject,
    state: Path,
    config: LlavaConfig,
    chat_template: str,
    dtypes: Sequence[torch.dtype],
) -> None:
    """Add the commands `export` and `eval`.

    Args:
        app: commands of a script.
        subject: model that they are about.
        state: file where its training state is saved.
        config: configuration of the model.
        chat_template: template of its chats, in Jinja.
        dtypes: types that it is measured in.
    """

    @app.command()
    def export(
        state: Annotated[Path, typer.Option(help="Saved training state.")] = state,
        out: Folder = subject.folder,
    ) -> None:
        """Write the checkpoint (float16) from the saved state, and check that it loads."""
        saved = torch.load(state, map_location="cpu")
        model = LlavaForConditionalGeneration(config)
        model.load_state_dict(saved["weights"])
        side = config.vision_config.image_size
        save_checkpoint(model, make_processor(side, PATCH, chat_template), out)
        console.print(f"{out}: step {saved['step']}, {saved['seconds']:.0f} s of training")

    @app.command(name="eval")
    def evaluate(
        model: Folder = subject.folder,
        samples: Annotated[int, typer.Option(help="Held-out pictures a task.")] = 300,
        first: Annotated[int, typer.Option(help="First of the held-out seeds to use.")] = 1000,
        filler: Annotated[int, typer.Option(help="Characters of text before the question.")] = 0,
        threads: Threads = 1,
    ) -> None:
        """Greedy generation on held-out pictures: exact words and character errors, in percent.

        The seeds below 1,000 were looked at while the models were developed: they are left out.
        """
        torch.set_num_threads(threads)
        for dtype, task in product(dtypes, TASKS):
            asked = subject.held_out(first, samples, task)
            text = filler_text(filler)
            answers = Reader(model, dtype).answer(asked.samples, asked.contexts, text)
            found = Marks.of(asked.answers, answers).statistics()
            record = {"task": task, "dtype": str(dtype).removeprefix("torch.")}
            record |= {"pictures": samples, "first": first, "filler": filler}
            record |= {"context": asked.contexts is not None}
            for name in ("exact_words", "character_errors"):
                record[name] = round(100 * float(found[name]), 2)
            console.print(json.dumps(record), soft_wrap=True)


def filler_text(length: int) -> str:
    """Unrelated prose of ``length`` characters, ended by a newline; empty for 0."""
    prose = "The quick brown fox jumps over the lazy dog, then it rests for a while. "
    return (prose * (length // len(prose) + 1))[: length - 1] + "\n" if length else ""


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
