"""`sparsemm eval`: what the command does and says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from sparsemm_vllm import __version__
from sparsemm_vllm.budget.profile import HeadProfile, load_profile
from sparsemm_vllm.budget.settings import NO_PROFILE, Settings
from sparsemm_vllm.commands.evaluate.engine import OWN_OPTIONS, Job, Result
from sparsemm_vllm.commands.evaluate.errors import EvalError
from sparsemm_vllm.commands.evaluate.figure import draw_records
from sparsemm_vllm.commands.evaluate.folder import EvalFolder
from sparsemm_vllm.commands.evaluate.points import Comparison, Point
from sparsemm_vllm.commands.evaluate.questions import (
    Choice,
    Questions,
    hash_questions,
    load_questions,
)
from sparsemm_vllm.commands.evaluate.records import Record, make_records
from sparsemm_vllm.commands.evaluate.report import print_records, save_json
from sparsemm_vllm.commands.evaluate.run import measure
from sparsemm_vllm.profiler.engine import parse_engine_options, prepare_process
from sparsemm_vllm.reader import READER, reader_folder


@dataclass(frozen=True)
class Evaluation:
    """What is asked for; see the command's options.

    Attributes:
        model: name or folder of the model.
        profile: name or file of its head profile; that of the bundled model if it is not given.
        settings: settings of all points; their profile is not looked at.
        comparison: points to measure.
        choice: questions to ask.
        max_tokens: most tokens of an answer.
        out: folder for results.
        engine_arguments: options of `vllm serve`.
    """

    model: str
    profile: str | None
    settings: Settings
    comparison: Comparison
    choice: Choice
    max_tokens: int
    out: Path
    engine_arguments: list[str]


def run_eval(asked: Evaluation, console: Console) -> int:
    """Measure all points that the folder does not have yet, and show them all.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        UserError, OSError: one line that says why.
    """
    profile = _profile(asked)
    shared = asked.settings.model_copy(update={"profile": profile or NO_PROFILE})
    points = asked.comparison.points(asked.model, profile)
    settings = {point: point.settings(shared).as_values() for point in points}
    prepare_process()
    _check_engine_options(asked.engine_arguments)
    questions = load_questions(asked.choice)
    configuration = _configuration(asked, profile, questions)
    folder = EvalFolder(asked.out, configuration)

    def job_of(point: Point) -> Job:
        return Job(
            model=str(reader_folder()) if asked.model == READER else asked.model,
            engine_arguments=asked.engine_arguments,
            settings=settings[point],
            choice=asked.choice,
            max_tokens=asked.max_tokens,
            result=folder.point(point),
        )

    try:
        results = _measure(points, job_of, folder, sum(map(len, questions.values())), console)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted; the same command goes on from {asked.out}.", markup=False)
        return 130
    truths = {task: [one.answer for one in some] for task, some in questions.items()}
    _show(asked, configuration, make_records(truths, results), console)
    return 0


def _configuration(
    asked: Evaluation, profile: HeadProfile | None, questions: Questions
) -> dict[str, Any]:
    """What all points of a folder have in common, in JSON types."""
    source = asked.choice.source
    return {
        "model": asked.model,
        "profile": None if profile is None else _hash(profile),
        "window": asked.settings.window,
        "rho": asked.settings.rho,
        "data": source if source.isidentifier() else Path(source).name,
        "seed": asked.choice.seed,
        "questions": {task: len(some) for task, some in questions.items()},
        "questions_hash": hash_questions(questions),
        "max_tokens": asked.max_tokens,
        "engine_arguments": asked.engine_arguments,
        "version": __version__,
        "vllm_version": version("vllm"),
    }


def _show(
    asked: Evaluation,
    configuration: dict[str, Any],
    records: Sequence[Record],
    console: Console,
) -> None:
    print_records(records, asked.model, console)
    save_json(asked.out / "results.json", configuration, records)
    draw_records(records, asked.model, asked.out / "accuracy.png")
    for name in ("results.json", "accuracy.png"):
        console.print(f"saved {asked.out / name}", highlight=False, markup=False, soft_wrap=True)


def split_words(text: str) -> list[str]:
    """Words separated by commas."""
    return [word for part in text.split(",") if (word := part.strip())]


def split_numbers(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        EvalError: naming the option.
    """
    try:
        return [int(word) for word in split_words(text)]
    except ValueError:
        raise EvalError(f"{option} {text!a}: give whole numbers separated by commas") from None


def _profile(asked: Evaluation) -> HeadProfile | None:
    name = asked.profile or (READER if asked.model == READER else None)
    return None if name is None else load_profile(name)


def _hash(profile: HeadProfile) -> str:
    return sha256(profile.model_dump_json().encode()).hexdigest()


def _check_engine_options(arguments: list[str]) -> None:
    for name in parse_engine_options(arguments):
        if name in OWN_OPTIONS:
            raise EvalError(f"--{name.replace('_', '-')} is set by the evaluation itself")


def _measure(
    points: list[Point],
    job_of: Callable[[Point], Job],
    folder: EvalFolder,
    questions: int,
    console: Console,
) -> dict[Point, Result]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: list[TaskID] = []

        def on_point(point: Point, done: bool) -> None:
            name = f"{points.index(point) + 1}/{len(points)} {point.name}"
            done_before = questions if done else 0
            bars.append(progress.add_task(name, total=questions, completed=done_before))

        def on_answer(answered: int) -> None:
            progress.update(bars[-1], completed=answered)

        return measure(points, job_of, folder, on_point, on_answer)
