"""The models that are measured, and the questions they are asked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import ROOT
from tiny_vlm.prose import excerpt, held_out_text

from sparsemm_vllm.commands.evaluate.metrics import Marks
from sparsemm_vllm.data.pictures import EVAL_SEEDS, PROFILE_SEEDS, Sample, Task, make_sample

CONTEXT = (40, 121)  # characters of a system message, at least and less than
TASKS: tuple[Task, Task] = ("query", "read")


@dataclass(frozen=True)
class Questions:
    """Samples, and a system message for each; or none for any."""

    samples: list[Sample]
    contexts: list[str] | None

    @property
    def answers(self) -> list[str]:
        return [sample.answer for sample in self.samples]


@dataclass(frozen=True)
class Subject:
    """A checkpoint: its name, folder, head profile, and whether its pictures are cluttered ones.

    Questions about cluttered pictures follow a system message of natural text.
    """

    name: str
    folder: Path
    profile: Path
    cluttered: bool

    def held_out(self, first: int, count: int, task: Task) -> Questions:
        """Of ``EVAL_SEEDS``, from the first on; the first half of the held-out text."""
        return self._questions(EVAL_SEEDS, first, count, task, 0)

    def for_scores(self, first: int, count: int, task: Task) -> Questions:
        """Of ``PROFILE_SEEDS``, and the other half of the text."""
        return self._questions(PROFILE_SEEDS, first, count, task, 1)

    def _questions(self, seeds: range, first: int, count: int, task: Task, half: int) -> Questions:
        chosen = [seeds[first + i] for i in range(count)]
        samples = [make_sample(seed, task, clutter=self.cluttered) for seed in chosen]
        if not self.cluttered:
            return Questions(samples, None)
        text = held_out_text()
        middle = len(text) // 2
        return Questions(
            samples, [_context(text[middle:] if half else text[:middle], seed) for seed in chosen]
        )


def exact_words(marks: Marks, draws: np.ndarray | None = None) -> np.ndarray:
    """Share of the words that are exactly right: of all pictures, or of each draw of them."""
    return marks.statistics(draws)["exact_words"]


def _context(text: str, seed: int) -> str:
    rng = np.random.default_rng([seed, 1])
    return excerpt(text, rng, int(rng.integers(*CONTEXT)))


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "reader",
            ROOT / "sparsemm_vllm" / "reader",
            ROOT / "head_profiles" / "sparsemm-reader.json",
            cluttered=False,
        ),
        Subject(
            "instrument",
            ROOT / "benchmarks" / "instrument",
            ROOT / "benchmarks" / "instrument" / "profile.json",
            cluttered=True,
        ),
    )
}
