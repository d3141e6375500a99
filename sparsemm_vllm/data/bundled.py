"""Samples of the bundled generator: the reader's own pictures, and pages of English words."""

import numpy as np

from sparsemm_vllm.data.pictures import (
    MARGIN,
    MAX_FONT_SIZE,
    MIN_FONT_SIZE,
    PICTURE_SIZE,
    PROFILE_SEEDS,
    Page,
    Sample,
    draw_page,
    make_sample,
)
from sparsemm_vllm.data.samples import DataError

READ_PAGE = "Read all the text in the picture."
MAX_SIDE = 4096  # pixels; a larger page takes long to draw
MAX_WORDS = 60  # words on a page
NUMBERS = 0.15  # share of words that are numbers
CHARACTER_WIDTH = 0.75 * MIN_FONT_SIZE  # pixels of a wide font's smallest size, with its spacing
LINE_HEIGHT = 1.25 * MAX_FONT_SIZE  # pixels

WORDS = """
about above across after again almost along always among animal answer apple around arrive autumn
basket beach because before begin behind below better between bird black board bottle bottom branch
bread bridge bright bring brother brown build butter candle careful carry castle catch center chair
change cheese children choose circle city clean clear climb clock close cloud coffee cold color
common corner cotton count country cover cream cross dance dark daughter desert dinner doctor door
double dream dress drive during early earth east easy edge engine enough evening every example
family famous farmer father feather field finger finish fire first flat flower follow forest forward
fresh friend front fruit garden gentle glass gold grain grandfather grass great green ground group
guide half hammer happy harbor heart heavy history holiday honey horse hotel house hundred inside
island jacket journey kitchen knife ladder lake language large later laugh leader leaf learn leather
left lemon letter level library light listen little lunch machine market matter meadow measure metal
middle milk minute mirror money month morning mother mountain mouth music narrow nature needle never
night north number ocean office often orange order other outside paper parent part pencil people
pepper person piano picture piece pillow plain planet plant plate please pocket point powder present
pretty price purple question quick quiet rabbit rain reach ready reason record repair rest rice
right river road rocket round sailor salt sand school season second seven shadow shape sheep shelter
ship shirt short shoulder silver simple sister sleep slow small smile snow soft song south speak
spoon spring square stable stair star station stone store storm story straight street strong student
sugar summer sweet table teacher tender thank thick thread thunder ticket timber today together
tomato tower travel tree turn under uncle until valley value village visit voice wagon wait walk
wall warm watch water wave weather west wheat wheel white whole window winter woman wonder wood
world write yellow young
""".split()  # noqa: SIM905


def bundled_samples(count: int, seed: int, side: int = PICTURE_SIZE) -> list[Sample]:
    """Draw the samples of ``PROFILE_SEEDS``.

    Pictures of ``PICTURE_SIZE`` are of the kind that the bundled reader was trained on. The model
    reads one and is asked about the next, in turn. Larger ones, up to ``MAX_SIDE``, are pages of
    English words; the model reads all of them.

    Args:
        count: number of samples.
        seed: index of the first sample's seed in ``PROFILE_SEEDS``, from 0.
        side: width and height of the pictures, in pixels.

    Raises:
        DataError: if no pictures have this side, or there are not so many seeds.
    """
    if not PICTURE_SIZE <= side <= MAX_SIDE:
        raise DataError(
            f"pictures have at least {PICTURE_SIZE} pixels a side, at most {MAX_SIDE}, got {side}"
        )
    if not 0 <= seed <= len(PROFILE_SEEDS) - count:
        raise DataError(f"seed must be 0 to {len(PROFILE_SEEDS) - count}, got {seed}")
    seeds = PROFILE_SEEDS[seed : seed + count]
    if side > PICTURE_SIZE:
        return [_read(make_text_page(number, side)) for number in seeds]
    return [make_sample(number, "query" if i % 2 else "read") for i, number in enumerate(seeds)]


def make_text_page(seed: int, side: int) -> Page:
    """Draw lines of common English words and a few numbers, all different: a small document."""
    rng = np.random.default_rng(seed)
    room = side - 2 * MARGIN
    most = int(room / LINE_HEIGHT)
    words = _words(rng)
    lines: list[list[str]] = []
    for _ in range(rng.integers(most * 2 // 3, most + 1)):
        lines.append(_fill_line(words, int(room / CHARACTER_WIDTH)))
        if sum(map(len, lines)) >= MAX_WORDS:
            break
    return draw_page(rng, lines, side)


def _words(rng: np.random.Generator) -> list[str]:
    """More words than a page holds, all different."""
    numbers = rng.permutation(np.arange(10, 10_000))
    words = []
    for i, word in enumerate(rng.permutation(WORDS)):
        if rng.random() < NUMBERS:
            words.append(str(numbers[i]))
        else:
            words.append(word.capitalize() if rng.random() < 0.2 else str(word))
    return words


def _fill_line(words: list[str], characters: int) -> list[str]:
    """Take words for one line, a space counted after each."""
    line: list[str] = []
    while words and sum(len(word) + 1 for word in [*line, words[-1]]) <= characters:
        line.append(words.pop())
    return line


def _read(page: Page) -> Sample:
    words = page.words
    answer = " ".join(word.text for word in words)
    return Sample(page.image, words, READ_PAGE, answer, tuple(range(len(words))))
