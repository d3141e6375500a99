"""Pictures of random text, with the box of every word: what the bundled reader is trained on.

A picture is a pure function of its seed. It holds 2 to 5 lines of random words (capital letters and
the digits 2 to 9, so that nothing can be guessed and O/0, I/1 cannot be confused), each line at a
random place, in a random font, size and colour, on a noisy background of contrasting brightness.
Lines are separated vertically, so the reading order (top to bottom, left to right) is unambiguous.

A cluttered picture is larger, its lines are labelled, and shapes and scribbles lie between them.

Two tasks can be asked of a picture:

* ``read``: "Read the text." The answer is every word in reading order, separated by spaces.
* ``query``: "What follows KEY?" The answer is the rest of the line that begins with KEY.

Seeds are split once and for all: training draws from ``TRAIN_SEEDS``, accuracy is measured on
``EVAL_SEEDS``, head scores on ``PROFILE_SEEDS``, demonstrations and examples use ``DEMO_SEEDS``.

Boxes are half-open pixel ranges ``(x0, y0, x1, y1)``: the ink lies in ``image[y0:y1, x0:x1]``.

The glyphs are those of the DejaVu fonts that matplotlib ships (Bitstream Vera / DejaVu licence:
free to use, embed and redistribute); matplotlib is imported only to find them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
Task = Literal["read", "query"]
Line = tuple["Word", ...]

PICTURE_SIZE = 224  # pixels a side
CLUTTERED_SIZE = 256  # pixels a side of a cluttered picture
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")

TRAIN_SEEDS = range(0, 1_000_000_000)
EVAL_SEEDS = range(1_000_000_000, 2_000_000_000)
PROFILE_SEEDS = range(2_000_000_000, 3_000_000_000)
DEMO_SEEDS = range(3_000_000_000, 4_000_000_000)

MARGIN = 5  # pixels kept free at each edge
LINE_PITCH = 1.2  # smallest distance of two baselines, in font sizes
MIN_FONT_SIZE, MAX_FONT_SIZE = 20, 34  # pixels
MIN_CONTRAST = 110.0  # difference of luminance between ink and background, of 255
MAX_NOISE = 8.0  # standard deviation of the background noise, of 255
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)

DEMO_KEYS = ("GATE", "SEAT", "NAME", "CODE", "ROOM", "CITY", "BUS", "DESK")


@dataclass(frozen=True)
class Word:
    """A word of a picture: its text, the box of its ink, and that of each character if known."""

    text: str
    box: Box
    char_boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Page:
    """A picture and its lines of words, both in reading order."""

    image: Image.Image
    lines: tuple[Line, ...]

    @property
    def words(self) -> tuple[Word, ...]:
        """All words, in reading order."""
        return tuple(word for line in self.lines for word in line)


@dataclass(frozen=True)
class Sample:
    """A picture with a question about it.

    ``words`` are all words of the picture in reading order; ``answer_words`` are the indices into
    ``words`` of the words that make up ``answer``, in the order in which the answer says them, each
    as it is written.
    """

    image: Image.Image
    words: tuple[Word, ...]
    question: str
    answer: str
    answer_words: tuple[int, ...]

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """Where the answer says each of ``answer_words``: first character and the one behind."""
        spans, end = [], 0
        for index in self.answer_words:
            text = self.words[index].text
            start = self.answer.index(text, end)
            end = start + len(text)
            spans.append((start, end))
        return tuple(spans)


@dataclass(frozen=True)
class _Glyph:
    """Coverage of one character, ``alpha [height, width]`` in 0..1, placed relative to the pen."""

    alpha: np.ndarray
    left: int  # from the pen's position to the ink
    top: int  # from the baseline to the ink, negative upwards
    advance: float


def make_sample(seed: int, task: Task = "read", clutter: bool = False) -> Sample:
    """The sample of a seed: the same arguments give the same picture, question and answer.

    Raises ``ValueError`` for an unknown task.
    """
    if task not in ("read", "query"):
        raise ValueError(f"task must be 'read' or 'query', got {task!r}")
    if clutter:
        page = make_cluttered_page(seed)
    else:
        page = make_page(seed, labelled=True if task == "query" else None)
    return read_sample(page) if task == "read" else query_sample(page, seed % len(page.lines))


def make_page(seed: int, labelled: bool | None = None) -> Page:
    """Draw the picture of a seed.

    ``labelled`` pages have 2 to 4 lines ``KEY value``; others have 3 to 8 words on at most 5 lines.
    By default the seed decides (even odds).
    """
    rng = np.random.default_rng(seed)
    coin = bool(rng.random() < 0.5)
    labelled = coin if labelled is None else labelled
    return draw_page(rng, _labelled_text(rng) if labelled else _free_text(rng))


def make_cluttered_page(seed: int) -> Page:
    """Draw the larger picture of a seed: 2 to 4 lines ``KEY value`` among shapes and scribbles.

    The shapes keep clear of the words, whose contrast is that of other pages.
    """
    rng = np.random.default_rng(seed)
    return draw_page(rng, _labelled_text(rng), CLUTTERED_SIZE, int(rng.integers(8, 25)))


def make_demo_sample(seed: int, task: Task = "query") -> Sample:
    """Like ``make_sample``, but the keys are words a person would use (GATE, SEAT, ...)."""
    rng = np.random.default_rng(seed)
    keys = rng.permutation(DEMO_KEYS)[:4]
    page = draw_page(rng, [[str(key), _random_word(rng, 4, 6)] for key in keys])
    return read_sample(page) if task == "read" else query_sample(page, seed % len(page.lines))


def read_sample(page: Page) -> Sample:
    """Ask for all the words of a page."""
    words = page.words
    answer = " ".join(word.text for word in words)
    return Sample(page.image, words, "Read the text.", answer, tuple(range(len(words))))


def query_sample(page: Page, line: int) -> Sample:
    """Ask for what follows the first word of a line.

    Raises ``ValueError`` when nothing follows it.
    """
    key, *values = page.lines[line]
    if not values:
        raise ValueError(f"line {line} has one word only, nothing follows {key.text!r}")
    start = sum(len(other) for other in page.lines[:line]) + 1
    answer = " ".join(word.text for word in values)
    indices = tuple(range(start, start + len(values)))
    return Sample(page.image, page.words, f"What follows {key.text}?", answer, indices)


# What is written: random words, all different on one page.


def _random_word(rng: np.random.Generator, shortest: int, longest: int) -> str:
    length = int(rng.integers(shortest, longest + 1))
    return "".join(ALPHABET[i] for i in rng.integers(len(ALPHABET), size=length))


def _labelled_text(rng: np.random.Generator) -> list[list[str]]:
    def line() -> list[str]:
        if rng.random() < 0.15:
            return [_random_word(rng, 3, 4), _random_word(rng, 3, 3), _random_word(rng, 3, 3)]
        return [_random_word(rng, 3, 4), _random_word(rng, 3, 6)]

    return _all_different(rng, [line() for _ in range(rng.integers(2, 5))])


def _free_text(rng: np.random.Generator) -> list[list[str]]:
    count = int(rng.integers(3, 9))
    rows = int(rng.integers((count + 1) // 2, min(5, count) + 1))
    pairs = set(rng.permutation(rows)[: count - rows].tolist())
    lines = [
        [_random_word(rng, 3, 6)] if row not in pairs else [_random_word(rng, 3, 5) for _ in "ab"]
        for row in range(rows)
    ]
    return _all_different(rng, lines)


def _all_different(rng: np.random.Generator, lines: list[list[str]]) -> list[list[str]]:
    """Replace repeated words, so that a question names one line."""
    seen: set[str] = set()
    for line in lines:
        for i, text in enumerate(line):
            while text in seen:
                text = _random_word(rng, len(text), len(text))
            seen.add(text)
            line[i] = text
    return lines


# How it is drawn.


def draw_page(
    rng: np.random.Generator, lines: list[list[str]], side: int = PICTURE_SIZE, shapes: int = 0
) -> Page:
    """Draw lines of words on a picture of ``side`` pixels, each where and how the generator says.

    Up to ``shapes`` random shapes are drawn where no word is.

    The lines must fit: about 1.3 characters for every 20 pixels of width, one for 41 of height.
    """
    canvas = _background(rng, side)
    ground = float((canvas @ LUMINANCE).mean())
    styles = [_fit_line(rng, words, side) for words in lines]
    placed = []
    for words, (font, size, tracking, gap), top in zip(
        lines, styles, _line_tops(rng, [style[1] for style in styles], side), strict=True
    ):
        free = side - 2 * MARGIN - _line_width(words, font, size, tracking, gap)
        x = MARGIN + rng.random() * free
        ink = _ink_colour(rng, ground)
        placed.append(_draw_line(canvas, words, font, size, tracking, gap, x, top + size, ink))
    boxes = [word.box for line in placed for word in line]
    for _ in range(shapes):
        _draw_shape(rng, canvas, boxes)
    noise = rng.random() * MAX_NOISE
    canvas += noise * rng.standard_normal((side, side, 1), dtype=np.float32)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Page(Image.fromarray(pixels), tuple(placed))


def _draw_shape(rng: np.random.Generator, canvas: np.ndarray, boxes: list[Box]) -> None:
    """Blend a random shape into the canvas, in place, if it happens to fall clear of the boxes."""
    side = len(canvas)
    width, height = (int(edge) for edge in rng.integers(8, 97, size=2))
    x, y = (int(rng.integers(side - edge)) for edge in (width, height))
    kind = int(rng.integers(4))
    corners = rng.random((8, 2)) * (width - 1, height - 1)
    thickness = int(rng.integers(1, 5))
    colour = rng.uniform(0, 255, 3).astype(np.float32)
    strength = float(rng.uniform(0.4, 1.0))
    if any(
        x - MARGIN < x1 and x0 < x + width + MARGIN and y - MARGIN < y1 and y0 < y + height + MARGIN
        for x0, y0, x1, y1 in boxes
    ):
        return
    tile = Image.new("L", (width, height))
    pen = ImageDraw.Draw(tile)
    frame = (0, 0, width - 1, height - 1)
    if kind == 0:
        pen.rectangle(frame, outline=255, width=thickness)
    elif kind == 1:
        pen.ellipse(frame, fill=255)
    elif kind == 2:
        pen.rectangle(frame, fill=255)
    else:
        pen.line([(float(a), float(b)) for a, b in corners], fill=255, width=thickness)
    alpha = strength * np.asarray(tile, dtype=np.float32) / 255
    _blend(canvas, _Glyph(alpha, 0, 0, 0.0), x, y, colour)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """One colour with a slight linear gradient, ``[height, width, 3]``, float32 in 0..255."""
    colour = rng.uniform(0, 255, 3).astype(np.float32)
    slope = rng.uniform(-20, 20, 2).astype(np.float32)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    return np.clip(colour + shade[..., None], 0, 255)


def _ink_colour(rng: np.random.Generator, ground: float) -> np.ndarray:
    """A random colour whose luminance is far enough from the background's."""
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float(colour @ LUMINANCE) - ground) >= MIN_CONTRAST:
            return colour


def _fit_line(
    rng: np.random.Generator, words: list[str], side: int
) -> tuple[str, int, float, float]:
    """Font, size, letter spacing and word gap (pixels), the size reduced until the line fits."""
    font = FONTS[rng.integers(len(FONTS))]
    size = int(rng.integers(MIN_FONT_SIZE + 2, MAX_FONT_SIZE + 1))
    tracking, gap = rng.uniform(0.03, 0.10), rng.uniform(0.6, 1.0)
    room = side - 2 * MARGIN
    while _line_width(words, font, size, tracking * size, gap * size) > room:
        size -= 1
        if size < MIN_FONT_SIZE:
            return _fit_line(rng, words, side)
    return font, size, tracking * size, gap * size


def _line_tops(rng: np.random.Generator, sizes: list[int], side: int) -> list[int]:
    """Tops of the lines: the height that they leave is split at random between the gaps."""
    heights = [LINE_PITCH * size for size in sizes]
    slack = side - 2 * MARGIN - sum(heights)
    cuts = np.sort(rng.random(len(sizes))) * slack
    above = np.cumsum([0.0, *heights[:-1]])
    return [MARGIN + int(top) for top in above + cuts]


def _line_width(words: list[str], font: str, size: int, tracking: float, gap: float) -> float:
    letters = "".join(words)
    pens = sum(_glyph(font, size, letter).advance for letter in letters)
    return pens + tracking * len(letters) + gap * (len(words) - 1)


def _draw_line(
    canvas: np.ndarray,
    words: list[str],
    font: str,
    size: int,
    tracking: float,
    gap: float,
    x: float,
    baseline: int,
    ink: np.ndarray,
) -> Line:
    """Blend one line into the canvas, in place, and return its words with their boxes."""
    placed = []
    for text in words:
        boxes = []
        for letter in text:
            glyph = _glyph(font, size, letter)
            boxes.append(_blend(canvas, glyph, round(x) + glyph.left, baseline + glyph.top, ink))
            x += glyph.advance + tracking
        placed.append(Word(text, _union(boxes), tuple(boxes)))
        x += gap
    return tuple(placed)


def _blend(canvas: np.ndarray, glyph: _Glyph, x: int, y: int, ink: np.ndarray) -> Box:
    height, width = glyph.alpha.shape
    area = canvas[y : y + height, x : x + width]
    area += glyph.alpha[..., None] * (ink - area)
    return x, y, x + width, y + height


def _union(boxes: list[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


@lru_cache(maxsize=4096)
def _glyph(font: str, size: int, letter: str) -> _Glyph:
    """Rasterise one character, cropped to its ink; narrow ones get at least half a size of room."""
    face = _face(font, size)
    left, top, right, bottom = (int(edge) for edge in face.getbbox(letter, anchor="ls"))
    tile = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(tile).text((1 - left, 1 - top), letter, fill=255, font=face, anchor="ls")
    crop = tile.getbbox()
    if crop is None:
        raise ValueError(f"{font} has no ink for {letter!r}")
    alpha = np.asarray(tile.crop(crop), dtype=np.float32) / 255
    advance = face.getlength(letter)
    room = max(advance, 0.5 * size)
    shift = round((room - advance) / 2)
    return _Glyph(alpha, left - 1 + crop[0] + shift, top - 1 + crop[1], room)


@lru_cache(maxsize=128)
def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings the fonts, and takes a while

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
