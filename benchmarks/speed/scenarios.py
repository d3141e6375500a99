"""What servers are asked: prompts with pictures, answers of fixed length, light and heavy loads.

Pictures are drawn from a seed and lie in files that the server opens itself, so neither the network
nor base64 is measured. Each scenario draws its own, whichever server is asked, and no two loads
share one, unless the scenario says that its requests do.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sparsemm_vllm.files import write_whole

SEED = 0
SPECK = 14  # pixels: a patch of most vision models
QUESTION = "Question {:04d}: what can be seen in the picture?"

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Load:
    """Requests that arrive as a Poisson process, or all at once.

    Attributes:
        rate: requests a second.
        requests: number of all requests.
    """

    rate: float | Literal["inf"]
    requests: int


@dataclass(frozen=True)
class Scenario:
    """Requests of one kind, under one load after another.

    Attributes:
        name: name of the scenario, unique.
        purpose: text that says what it shows, for the table.
        pictures: sizes of the pictures of a prompt.
        shared: number of different prompts of pictures, asked about in turn; None: every request
            brings its own.
        output_tokens: tokens of every answer.
        loads: loads, from light to saturated.
    """

    name: str
    purpose: str
    pictures: tuple[Size, ...]
    shared: int | None
    output_tokens: int
    loads: tuple[Load, ...]


@dataclass(frozen=True)
class Chats:
    """Chats, one after the other: a question, the same again, and a second turn.

    Attributes:
        pictures: sizes of the pictures of the first question.
        output_tokens: tokens of the first answer, which the second turn repeats.
        count: number of chats.
    """

    pictures: tuple[Size, ...]
    output_tokens: int
    count: int


@dataclass(frozen=True)
class Plan:
    """One model, served dense and with SPARSEMM in turn.

    Attributes:
        model: name of a model of ``benchmarks/models``, or `READER`.
        options: options of both servers, as `vllm serve` spells them; with the memory.
        dense: options of the dense server alone.
        sparsemm: settings of SPARSEMM; the profile is the model's own.
        scenarios: scenarios that are measured.
        chats: chats that are measured, if any.
        warm_up: number of requests at once before anything is measured, of the kind of the first
            scenario.
    """

    model: str
    options: tuple[str, ...]
    dense: tuple[str, ...]
    sparsemm: dict[str, Any]
    scenarios: tuple[Scenario, ...]
    chats: Chats | None
    warm_up: int


def draw(size: Size, *names: str | int) -> Image.Image:
    """Coloured specks, a function of size and names. They make small PNG files, unlike noise."""
    rng = np.random.default_rng([SEED, *(zlib.crc32(str(name).encode()) for name in names)])
    width, height = size
    specks = rng.integers(0, 256, (-(-height // SPECK), -(-width // SPECK), 3), dtype=np.uint8)
    return Image.fromarray(specks.repeat(SPECK, 0).repeat(SPECK, 1)[:height, :width])


def write_pictures(folder: Path, sizes: tuple[Size, ...], *names: str | int) -> list[Path]:
    """The pictures of a prompt, in files.

    Args:
        folder: folder, which is made.
        sizes: width and height of each picture, in pixels.
        names: words that set them apart from those of other prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, size in enumerate(sizes):
        files.append(folder / f"{names[-1]}-{number}.png")
        draw(size, *names, number).save(files[-1], compress_level=1)
    return files


def write_requests(folder: Path, scenario: Scenario, load: Load) -> Path:
    """The requests of a load, as vLLM's ``custom_image`` data set: a JSON line for each.

    Args:
        folder: folder, which is made; for the pictures too.
        scenario: pictures and lengths.
        load: number of requests.

    Returns:
        The file of JSON lines.
    """
    kinds = scenario.shared or load.requests
    names = (scenario.name, load.rate)
    prompts = [write_pictures(folder, scenario.pictures, *names, kind) for kind in range(kinds)]
    lines = []
    for number in range(load.requests):
        parts = [{"type": "image", "image": str(file)} for file in prompts[number % kinds]]
        text = {"type": "text", "text": QUESTION.format(number)}
        lines.append(json.dumps({"content": [*parts, text]}))
    file = folder / "requests.jsonl"
    write_whole(file, "\n".join(lines) + "\n")
    return file
