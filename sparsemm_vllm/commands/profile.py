"""`sparsemm profile`: what the command does and says."""

import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparsemm_vllm.budget.profile import HeadProfile, save_profile
from sparsemm_vllm.data import SampleSet, load_samples
from sparsemm_vllm.environment import quieten_vllm
from sparsemm_vllm.profiler.engine import parse_engine_options, prepare_process
from sparsemm_vllm.profiler.errors import ProfilerError
from sparsemm_vllm.profiler.reliability import WANTED, samples_missing
from sparsemm_vllm.profiler.run import profile_model


def run_profile(
    model: str,
    out: Path,
    samples: int,
    data: str,
    mode: str,
    seed: int,
    resume: bool,
    force: bool,
    engine_arguments: list[str],
    console: Console,
) -> int:
    """Measure a profile and write it; see `profile_model`.

    Args:
        model: name or folder of the model.
        out: file for the profile; what is done stands in ``OUT.partial`` meanwhile.
        samples: number of samples that the model is asked.
        data: source of the samples; see `load_samples`.
        mode: way of measuring, one of `MODES`.
        seed: seed of the choice of samples.
        resume: whether to continue what ``OUT.partial`` keeps.
        force: whether to replace a profile that exists.
        engine_arguments: options of `vllm serve`.
        console: terminal to print on.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        UserError, OSError: one line that says why there is no profile.
    """
    _check_output(out, force)
    quieten_vllm()
    prepare_process()
    options = parse_engine_options(engine_arguments)
    chosen = load_samples(data, samples, seed)
    _say_skipped(chosen, samples, console)
    partial = out.with_name(out.name + ".partial")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("to go"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("vLLM starts", total=len(chosen.samples))
            profile = profile_model(
                model,
                chosen,
                mode,
                seed=seed,
                partial=partial,
                resume=resume,
                on_progress=lambda done: progress.update(
                    bar, completed=done, description="samples"
                ),
                **options,
            )
    except KeyboardInterrupt:
        kept = f"; --resume continues from {partial}" if partial.exists() else ""
        console.print(f"\nInterrupted{kept}.", highlight=False, markup=False, soft_wrap=True)
        return 130
    save_profile(profile, out)
    partial.unlink(missing_ok=True)
    _say_result(profile, out, console)
    return 0


def _check_output(out: Path, force: bool) -> None:
    if out.is_dir():
        raise ProfilerError(f"{out} is a folder; name the file to write")
    if out.exists() and not force:
        raise ProfilerError(f"{out} exists; --force replaces it")
    if not os.access(out.parent, os.W_OK):
        raise ProfilerError(f"{out}: its folder does not exist or cannot be written")


def _say_skipped(chosen: SampleSet, wanted: int, console: Console) -> None:
    lines = [f"left out: {count} {reason}" for reason, count in chosen.skipped.items()]
    if len(chosen.samples) < wanted:
        lines.append(f"{chosen.name} has {len(chosen.samples)} usable samples, not {wanted}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _say_result(profile: HeadProfile, out: Path, console: Console) -> None:
    ranked = np.sort(np.array(profile.scores), axis=None)[::-1]
    best = max(1, round(0.05 * ranked.size))
    lines = [
        f"saved {out}: {profile.provenance['tokens']} tokens in {profile.samples} samples; the top "
        f"{best} of {ranked.size} heads hold {ranked[:best].sum() / ranked.sum():.0%} of the score"
    ]
    if warning := _reliability(profile):
        lines.append(warning)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _reliability(profile: HeadProfile) -> str | None:
    """A warning, if another choice of samples would give other scores."""
    assert profile.samples is not None
    correlation = profile.split_half
    if correlation is None:
        return "warning: too few samples to say how reliable the scores are"
    if correlation >= WANTED:
        return None
    text = f"warning: the scores of two halves of the samples correlate with {correlation:.2f} only"
    missing = samples_missing(profile.samples, correlation)
    if missing is None:
        return f"{text}: they are noise, and more samples of this kind will not help"
    return f"{text}; {missing} more samples would bring it to {WANTED} (Spearman-Brown)"
