"""The picture generator: reproducible, boxes true to the ink, answers true to the words."""

import itertools

import numpy as np
import pytest

from sparsemm_vllm.data import pictures
from sparsemm_vllm.data.pictures import (
    ALPHABET,
    DEMO_SEEDS,
    EVAL_SEEDS,
    PICTURE_SIZE,
    PROFILE_SEEDS,
    TRAIN_SEEDS,
    Box,
    Page,
    make_cluttered_page,
    make_demo_sample,
    make_page,
    make_sample,
    query_sample,
)

SEEDS = [EVAL_SEEDS[i] for i in range(40)]


def pixels(page: Page) -> np.ndarray:
    return np.asarray(page.image).astype(int)


def crop(array: np.ndarray, box: Box) -> np.ndarray:
    x0, y0, x1, y1 = box
    return array[y0:y1, x0:x1]


@pytest.mark.parametrize("task", ["read", "query"])
def test_a_seed_gives_one_picture(task):
    first, again, other = (make_sample(seed, task) for seed in (7, 7, 8))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.words == again.words
    assert (first.question, first.answer) == (again.question, again.answer)
    assert first.image.tobytes() != other.image.tobytes()


def test_pictures_have_the_native_size():
    image = make_page(0).image
    assert (image.mode, image.size) == ("RGB", (PICTURE_SIZE, PICTURE_SIZE))


def white(rng: np.random.Generator, side: int) -> np.ndarray:
    return np.full((side, side, 3), 255, dtype=np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_hold_all_ink_tightly(seed, monkeypatch):
    """Black ink on a flat white ground: everything dark lies in a box, and touches its sides."""
    monkeypatch.setattr(pictures, "_background", white)
    monkeypatch.setattr(pictures, "_ink_colour", lambda rng, ground: np.zeros(3, np.float32))
    monkeypatch.setattr(pictures, "MAX_NOISE", 0.0)
    page = make_page(seed)
    ink = pixels(page)[..., 0] < 255
    for word in page.words:
        inside = crop(ink, word.box)
        edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
        assert inside.shape[0] > 0, word
        assert all(edge.any() for edge in edges), word
        for box in word.char_boxes:
            assert crop(ink, box).any()
    for word in page.words:
        crop(ink, word.box)[...] = False
    assert not ink.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_words_stand_out_from_the_background(seed):
    page = make_page(seed)
    grey = pixels(page) @ pictures.LUMINANCE
    for word in page.words:
        inside = crop(grey, word.box)
        assert inside.max() - inside.min() > pictures.MIN_CONTRAST / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_lines_are_in_reading_order_and_apart(seed):
    lines = make_page(seed).lines
    for line in lines:
        for left, right in itertools.pairwise(line):
            assert left.box[2] < right.box[0]
    baselines = [max(box[3] for w in line for box in w.char_boxes[:1]) for line in lines]
    assert baselines == sorted(baselines)
    for upper, lower in itertools.pairwise(lines):
        assert max(word.box[3] for word in upper) <= min(word.box[1] for word in lower)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_word_is_random_different_and_as_long_as_its_boxes(seed):
    words = make_page(seed).words
    assert len({word.text for word in words}) == len(words)
    for word in words:
        assert set(word.text) <= set(ALPHABET)
        assert len(word.char_boxes) == len(word.text)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", ["read", "query"])
def test_the_answer_is_made_of_its_words(seed, task):
    sample = make_sample(seed, task)
    assert sample.answer == " ".join(sample.words[i].text for i in sample.answer_words)


def test_read_answers_with_every_word():
    sample = make_sample(3, "read")
    assert sample.answer_words == tuple(range(len(sample.words)))


@pytest.mark.parametrize("seed", SEEDS)
def test_query_answers_with_the_rest_of_the_line(seed):
    page = make_page(seed, labelled=True)
    for number, (key, *values) in enumerate(page.lines):
        sample = query_sample(page, number)
        assert sample.question == f"What follows {key.text}?"
        assert sample.answer == " ".join(word.text for word in values)


def test_queries_ask_about_every_line():
    asked = {make_sample(seed, "query").answer_words[0] for seed in range(60)}
    assert len(asked) > 3


def test_a_line_of_one_word_cannot_be_asked_about():
    page = next(p for p in map(make_page, range(100)) if any(len(line) == 1 for line in p.lines))
    number = [len(line) for line in page.lines].index(1)
    with pytest.raises(ValueError, match="nothing follows"):
        query_sample(page, number)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'read' or 'query'"):
        make_sample(0, "guess")  # type: ignore[arg-type]


def test_demo_keys_are_words():
    sample = make_demo_sample(DEMO_SEEDS[0])
    assert sample.question.removeprefix("What follows ").rstrip("?") in pictures.DEMO_KEYS


def test_seed_ranges_are_disjoint():
    splits = sorted((TRAIN_SEEDS, EVAL_SEEDS, PROFILE_SEEDS, DEMO_SEEDS), key=lambda r: r.start)
    for left, right in itertools.pairwise(splits):
        assert left.stop <= right.start


def test_a_seed_gives_one_cluttered_picture():
    first, again, other = (make_sample(seed, "query", clutter=True) for seed in (7, 7, 8))
    assert first.image.size == (pictures.CLUTTERED_SIZE, pictures.CLUTTERED_SIZE)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.words, first.question, first.answer) == (
        again.words,
        again.question,
        again.answer,
    )
    assert first.image.tobytes() != other.image.tobytes()
    read = make_sample(7, "read", clutter=True)
    assert read.words == first.words
    assert first.answer in read.answer


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_clutter_keeps_clear_of_the_words(seed, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_NOISE", 0.0)
    cluttered = make_cluttered_page(seed)
    monkeypatch.setattr(pictures, "_draw_shape", lambda *args: None)
    plain = make_cluttered_page(seed)
    assert cluttered.words == plain.words
    for word in plain.words:
        assert np.array_equal(crop(pixels(cluttered), word.box), crop(pixels(plain), word.box))


def test_clutter_is_there(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_NOISE", 0.0)
    cluttered = [pixels(make_cluttered_page(seed)) for seed in SEEDS[:10]]
    monkeypatch.setattr(pictures, "_draw_shape", lambda *args: None)
    changed = [
        (page != pixels(make_cluttered_page(seed))).any(-1).mean()
        for seed, page in zip(SEEDS, cluttered, strict=False)
    ]
    assert np.mean(changed) > 0.02


def test_an_unknown_task_is_refused_for_cluttered_pictures_too():
    with pytest.raises(ValueError, match="task must be 'read' or 'query'"):
        make_sample(0, "write", clutter=True)
