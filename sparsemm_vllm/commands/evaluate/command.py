"""`sparsemm eval`: what the command does and says."""

from collections.abc import Callable
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
from sparsemm_vllm.budget.settings import NO_PROFILE
from sparsemm_vllm.commands.evaluate.engine import OWN_OPTIONS, Job, Result
from sparsemm_vllm.commands.evaluate.errors import EvalError
from sparsemm_vllm.commands.evaluate.figure import draw_records
from sparsemm_vllm.commands.evaluate.folder import EvalFolder
from sparsemm_vllm.commands.evaluate.points import (
    DENSE,
    Point,
    mask_points,
    method_points,
    parse_share,
)
from sparsemm_vllm.commands.evaluate.questions import hash_questions, load_questions
from sparsemm_vllm.commands.evaluate.records import make_records
from sparsemm_vllm.commands.evaluate.report import print_records, save_json
from sparsemm_vllm.commands.evaluate.run import measure
from sparsemm_vllm.profiler.engine import parse_engine_options, prepare_process
from sparsemm_vllm.reader import READER, reader_folder


@dataclass(frozen=True)
class Evaluation:
    """What is asked for; see the command's options.

    Attributes:
        model: name or folder.
        methods, budgets, redistribute: points to measure beside the dense cache.
        tasks, samples, source, seed: see `load_questions`.
        profile: name or file; that of the bundled model if it is not given.
        window, rho: settings of all points.
        max_tokens: of an answer.
        mask_share: share of the query heads to silence, as text; none for no such points.
        masks, draws: see `mask_points`.
        out: folder.
        engine_arguments: options of `vllm serve`.
    """

    model: str
    methods: list[str]
    budgets: list[int]
    redistribute: bool
    tasks: list[str]
    samples: int
    source: str
    seed: int
    profile: str | None
    window: int
    rho: float
    max_tokens: int
    mask_share: str | None
    masks: list[str]
    draws: int
    out: Path
    engine_arguments: list[str]


def run_eval(asked: Evaluation, console: Console) -> int:
    """Measure all points that the folder does not have yet, and show them all.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        EvalError, DataError, ProfileError, ProfilerError, SettingsError, OSError: in one line.
    """
    profile = _profile(asked)
    shared: dict[str, Any] = {
        "window": asked.window,
        "rho": asked.rho,
        "profile": NO_PROFILE if profile is None else profile.model_dump(mode="json"),
    }
    points = _points(asked, profile)
    for point in points:
        point.settings(shared)
    prepare_process()
    _check_engine_options(asked.engine_arguments)
    questions = load_questions(asked.source, asked.tasks, asked.samples, asked.seed)
    configuration = {
        "model": asked.model,
        "profile": None if profile is None else _hash(profile),
        "window": asked.window,
        "rho": asked.rho,
        "data": asked.source if asked.source.isidentifier() else Path(asked.source).name,
        "seed": asked.seed,
        "questions": {task: len(some) for task, some in questions.items()},
        "questions_hash": hash_questions(questions),
        "max_tokens": asked.max_tokens,
        "engine_arguments": asked.engine_arguments,
        "version": __version__,
        "vllm_version": version("vllm"),
    }
    folder = EvalFolder(asked.out, configuration)

    def job_of(point: Point) -> Job:
        return Job(
            model=str(reader_folder()) if asked.model == READER else asked.model,
            engine_arguments=asked.engine_arguments,
            settings=point.settings(shared),
            source=asked.source,
            tasks=asked.tasks,
            samples=asked.samples,
            seed=asked.seed,
            max_tokens=asked.max_tokens,
            result=folder.point(point),
        )

    try:
        results = _measure(points, job_of, folder, sum(map(len, questions.values())), console)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted; the same command goes on from {asked.out}.", markup=False)
        return 130
    truths = {task: [one.answer for one in some] for task, some in questions.items()}
    records = make_records(truths, results)
    print_records(records, asked.model, console)
    save_json(asked.out / "results.json", configuration, records)
    draw_records(records, asked.model, asked.out / "accuracy.png")
    for name in ("results.json", "accuracy.png"):
        console.print(f"saved {asked.out / name}", highlight=False, markup=False, soft_wrap=True)
    return 0


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


def _points(asked: Evaluation, profile: HeadProfile | None) -> list[Point]:
    """All points, the dense cache first.

    Raises:
        EvalError: if there is nothing to compare, or a profile is wanting.
    """
    points = [Point(DENSE)]
    points += method_points(asked.methods, asked.budgets, asked.redistribute)
    if profile is None and any(point.method == "sparsemm" for point in points):
        raise EvalError(
            f"sparsemm needs a head profile of {asked.model}: give --profile (`sparsemm profile` "
            "makes one)"
        )
    if asked.mask_share is not None:
        if profile is None:
            raise EvalError(f"--mask-heads needs a head profile of {asked.model}: give --profile")
        points += mask_points(profile, parse_share(asked.mask_share), asked.masks, asked.draws)
    if len(points) == 1:
        raise EvalError("nothing to compare with the dense cache: give --methods and --budgets")
    return points


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
