"""Accuracy of pruned caches and the cost of single heads, in torch and transformers: no engine.

    python benchmarks/offline_eval.py curves reader      # accuracy against held KV bytes
    python benchmarks/offline_eval.py heads reader       # knock-outs, masked heads, concentration
    python benchmarks/offline_eval.py causal reader      # head profile from what pruning costs
    python benchmarks/offline_eval.py spare reader --head 1-0   # SparseMM but for some heads
    python benchmarks/offline_eval.py plot reader        # PNG from the JSON files

The prompt is computed densely; then a mask per KV head stands for what a pruned cache holds.
Scores, selection and budgets are the plugin's own reference functions.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from common import RESULTS, ROOT
from offline.curves import entries, task_curves
from offline.heads import knocked_out, loss_rises, silenced
from offline.model import OfflineModel
from offline.plots import plot_curves, plot_heads
from offline.pruning import REDISTRIBUTED, held_tokens, shown_tokens
from offline.subjects import SUBJECTS, TASKS, Subject
from tiny_vlm.commands import Threads, console, save_scores
from tiny_vlm.memory import keep_freed_memory
from tiny_vlm.visual_scores import concentration, rank_correlation

from sparsemm_vllm.budget.profile import HeadProfile, load_profile
from sparsemm_vllm.commands.evaluate.metrics import Marks
from sparsemm_vllm.files import write_whole

WINDOW = 16
BUDGETS = (32, 48, 64, 96, 128, 192, 256)
FIRST = 1000  # of the held-out seeds: fewer were looked at while the reader was developed
SPARED = 5000  # first of the profile seeds for `spare`: not those of the scores

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Name = Annotated[str, typer.Argument(help=f"Model: {', '.join(SUBJECTS)}.")]
Pictures = Annotated[int, typer.Option(help="Held-out pictures a point.")]


@app.command()
def curves(
    name: Name,
    pictures: Pictures = 300,
    budget: Annotated[list[int], typer.Option(help="Tokens per KV head; repeatable.")] = [*BUDGETS],  # noqa: B006
    causal: Annotated[
        Path | None, typer.Option(help="Causal head profile, if there is one.")
    ] = None,
    threads: Threads = 1,
) -> None:
    """Accuracy of every method at every budget, and what each needs for 97 % of dense."""
    subject, model = prepare(name, threads)
    scores = load_profile(str(subject.profile)).tensor()
    found = entries(scores, load_profile(str(causal)).tensor() if causal else None)
    records: list[dict[str, Any]] = []
    for task in TASKS:
        questions = subject.held_out(FIRST, pictures, task)
        for record in task_curves(model, questions, task, found, sorted(budget)):
            console.print(json.dumps(record), soft_wrap=True)
            records.append(record)
        write(name, "curves", {**about(subject, pictures), "records": records})


@app.command()
def causal(
    name: Name,
    samples: Annotated[int, typer.Option(help="Samples of each of the two tasks.")] = 100,
    out: Annotated[Path | None, typer.Option(help="The head profile to write.")] = None,
    threads: Threads = 1,
) -> None:
    """Score KV heads by the rise of the answer's loss when one keeps only its window.

    Means over samples of ``PROFILE_SEEDS``, half of each task; a mean below zero counts as zero;
    the query heads of a KV head share its score evenly.
    """
    subject, model = prepare(name, threads)
    rises = torch.cat(
        [loss_rises(model, subject.for_scores(FIRST, samples, task)) for task in TASKS], -1
    )
    halves = [rises[..., half::2].mean(-1).clamp(min=0) for half in range(2)]
    path = out or RESULTS / f"offline-{name}-causal.json"
    shared = rises.mean(-1).clamp(min=0).double() / (group := model.Hq // model.Hkv)
    profile = save_scores(
        shared.repeat_interleave(group, 1),
        model.model.config,
        path,
        model_id=load_profile(str(subject.profile)).model_id,
        mode="causal",
        data="sparsemm_vllm.data.pictures",
        samples=rises.shape[-1],
        seed=FIRST,
        split_half=rank_correlation(*halves),
        provenance={
            "method": "Mean rise of the true answer's negative log-likelihood (nats a token) when "
            f"one KV head keeps only its window of {WINDOW} tokens; negative means are 0; shared "
            "evenly by the KV head's query heads.",
            "tool": f"benchmarks/offline_eval.py causal {name}",
        },
    )
    console.print(f"wrote {path}; split-half {profile.split_half}")


@app.command()
def heads(
    name: Name,
    pictures: Pictures = 300,
    knock_outs: Annotated[int, typer.Option(help="Held-out pictures a knock-out.")] = 100,
    draws: Annotated[int, typer.Option(help="Random sets of heads that are silenced.")] = 8,
    threads: Threads = 1,
) -> None:
    """Knock-outs against visual scores, silenced heads, concentration."""
    subject, model = prepare(name, threads)
    scores = load_profile(str(subject.profile)).tensor()
    by_kv_head = scores.unflatten(1, (model.Hkv, -1)).sum(-1)
    document = {**about(subject, pictures), "concentration": concentration(scores)}
    for task in TASKS:
        few = subject.held_out(FIRST, knock_outs, task)
        rises = loss_rises(model, few).mean(-1).double()
        dense, exact = knocked_out(model, few)
        document[task] = {
            "silenced": silenced(model, subject.held_out(FIRST, pictures, task), scores, draws),
            "knock_outs": {
                "pictures": knock_outs,
                "loss_rise": [[round(x, 5) for x in layer] for layer in rises.tolist()],
                "dense_exact_words": dense,
                "exact_words": exact,
                "visual_score_against_loss_rise": rank_correlation(by_kv_head, rises),
                "visual_score_against_lost_words": rank_correlation(
                    by_kv_head, dense - torch.tensor(exact, dtype=torch.float64)
                ),
                "concentration_of_loss_rise": concentration(rises.clamp(min=0)),
            },
        }
        console.print(json.dumps(document[task]), soft_wrap=True)
        write(name, "heads", document)


@app.command()
def spare(
    name: Name,
    head: Annotated[list[str], typer.Option(help="LAYER-HEAD of a KV head; repeatable.")],
    budget: Annotated[int, typer.Option(help="Tokens per KV head.")] = 128,
    pictures: Annotated[int, typer.Option(help="Pictures a task.")] = 100,
    threads: Threads = 1,
) -> None:
    """Accuracy of SparseMM when it leaves some heads whole, on pictures of ``PROFILE_SEEDS``."""
    subject, model = prepare(name, threads)
    scores = load_profile(str(subject.profile)).tensor()
    for task in TASKS:
        asked = subject.for_scores(SPARED, pictures, task)
        prompts = model.prompts(asked.samples, asked.contexts)
        everything = prompts.everything()
        pruned = shown_tokens(prompts, f"sparsemm{REDISTRIBUTED}", scores, budget)
        spared = pruned.clone()
        for layer, place in (map(int, one.split("-")) for one in head):
            spared[layer, :, place] = everything[layer, :, place]
        for kind, shown in {"dense": everything, "pruned": pruned, "spared": spared}.items():
            marks = Marks.of(asked.answers, model.answer(prompts, shown, asked.answers))
            record = {
                "task": task,
                "cache": kind,
                "held_tokens": round(float(held_tokens(shown).mean()), 2),
                "exact_words": round(float(marks.statistics()["exact_words"]), 4),
            }
            console.print(json.dumps(record), soft_wrap=True)


@app.command()
def plot(name: Name) -> None:
    """Draw the JSON files of `curves` and `heads`, as far as they are there."""
    if found := read(name, "curves"):
        plot_curves(found, RESULTS / f"offline-{name}-curves.png")
    if found := read(name, "heads"):
        profiles = [SUBJECTS[name].profile, RESULTS / f"offline-{name}-causal.json"]
        visual, causal = (by_kv_head(load_profile(str(path))) for path in profiles)
        plot_heads(found, visual, causal, RESULTS / f"offline-{name}-heads.png")


def by_kv_head(profile: HeadProfile) -> np.ndarray:
    return profile.tensor().unflatten(1, (profile.num_kv_heads, -1)).sum(-1).numpy()


def prepare(name: str, threads: int) -> tuple[Subject, OfflineModel]:
    if name not in SUBJECTS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(SUBJECTS)}")
    torch.set_num_threads(threads)
    keep_freed_memory()
    return SUBJECTS[name], OfflineModel(SUBJECTS[name].folder, WINDOW)


def about(subject: Subject, pictures: int) -> dict[str, Any]:
    return {
        "model": subject.name,
        "window": WINDOW,
        "first_seed": FIRST,
        "pictures": pictures,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read(name: str, what: str) -> dict[str, Any] | None:
    path = RESULTS / f"offline-{name}-{what}.json"
    return json.loads(path.read_text()) if path.exists() else None


def as_text(document: dict[str, Any]) -> str:
    """JSON with a record on each line."""
    records = ",\n".join(f"  {json.dumps(record)}" for record in document.get("records", []))
    rest = json.dumps({k: v for k, v in document.items() if k != "records"}, indent=1)
    return f'{rest[:-2]},\n "records": [\n{records}\n ]\n}}\n' if records else rest + "\n"


def write(name: str, what: str, document: dict[str, Any]) -> None:
    path = RESULTS / f"offline-{name}-{what}.json"
    write_whole(path, as_text(document))
    console.print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    app()
