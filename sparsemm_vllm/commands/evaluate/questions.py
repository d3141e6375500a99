"""What a model is asked: drawn pictures that no one has looked at, or a user's own."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict

from sparsemm_vllm.data import DataError, load_samples
from sparsemm_vllm.data.pictures import EVAL_SEEDS, Sample, Task, make_sample

DRAWN = "drawn"
TASKS: dict[str, Task] = {"ocr": "read", "qa": "query"}
FIRST_SEED = 1000  # the held-out pictures before it were looked at while the reader was made


@dataclass(frozen=True)
class Question:
    """A picture with a question, its true answer, and a system message if there is one."""

    image: Image.Image
    question: str
    answer: str
    context: str = ""

    def conversation(self) -> list[dict[str, Any]]:
        """As chat messages of vLLM's offline interface."""
        content = [
            {"type": "image_pil", "image_pil": self.image},
            {"type": "text", "text": self.question},
        ]
        system = [{"role": "system", "content": self.context}] if self.context else []
        return [*system, {"role": "user", "content": content}]


Questions = dict[str, list[Question]]  # by task


class Choice(BaseModel):
    """Which questions are asked: the same values and files give the same ones.

    Attributes:
        source: place of the questions. ``drawn``: held-out pictures of the bundled generator. Or a
            JSON Lines file like the ``metadata.jsonl`` of `datasets`' imagefolder: `file_name` of
            a picture beside it, `question`, `answer`, and if there are any `task` (of `TASKS`;
            ``qa`` if not given) and `context`, a system message. Or anything else that
            `load_samples` reads, which asks for all words: ``ocr``.
        tasks: tasks to ask, of `TASKS`.
        count: number of questions of each task; fewer if a file has no more.
        seed: number of the first picture if they are drawn, seed of the choice if not.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    tasks: list[str]
    count: int
    seed: int


def load_questions(choice: Choice) -> Questions:
    """Read or draw the questions of a choice.

    Raises:
        DataError: for an unknown task, a count below 1, or a source without such questions.
    """
    source, tasks, count, seed = choice.source, choice.tasks, choice.count, choice.seed
    if not tasks:
        raise DataError(f"give at least one of the tasks {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise DataError(f"unknown task {task!a}; known: {', '.join(TASKS)}")
    if count < 1:
        raise DataError(f"the number of samples must be at least 1, got {count}")
    if source == DRAWN:
        if not 0 <= seed <= len(EVAL_SEEDS) - count:
            raise DataError(f"seed must be 0 to {len(EVAL_SEEDS) - count}, got {seed}")
        seeds = EVAL_SEEDS[seed : seed + count]
        return {task: [_of(make_sample(n, TASKS[task])) for n in seeds] for task in tasks}
    if source.endswith(".jsonl"):
        return {task: _from_file(Path(source), task, count) for task in tasks}
    if tasks != ["ocr"]:
        raise DataError(f"{source} asks for all words only: give --tasks ocr")
    return {"ocr": [_of(sample) for sample in load_samples(source, count, seed).samples]}


def _of(sample: Sample) -> Question:
    return Question(sample.image, sample.question, sample.answer)


def _from_file(path: Path, task: str, count: int) -> list[Question]:
    """The first `count` questions of a task."""
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if row.get("task", "qa") != task:
                continue
            with Image.open(path.parent / row["file_name"]) as picture:
                image = picture.convert("RGB")
            question, answer = str(row["question"]), str(row["answer"]).strip()
        except (AttributeError, KeyError, ValueError, OSError) as error:
            raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from None
        if not answer:
            raise DataError(f"{path}, line {number}: the answer is empty")
        questions.append(Question(image, question, answer, str(row.get("context", ""))))
        if len(questions) == count:
            break
    if not questions:
        raise DataError(f"{path} has no question of the task {task}")
    return questions


def hash_questions(questions: Questions) -> str:
    """SHA-256, hexadecimal, of all tasks, pixels, questions, contexts and answers."""
    digest = hashlib.sha256()
    for task, asked in questions.items():
        for one in asked:
            text = task, one.image.size, one.question, one.context, one.answer
            digest.update(repr(text).encode())
            digest.update(one.image.convert("RGB").tobytes())
    return digest.hexdigest()
