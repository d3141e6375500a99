"""Samples of the bundled generator."""

import pytest

from sparsemm_vllm.data import DataError, load_samples
from sparsemm_vllm.data.bundled import MAX_WORDS, bundled_samples
from sparsemm_vllm.data.pictures import PICTURE_SIZE, PROFILE_SEEDS, make_sample
from support.samples import said


def test_bundled_samples_are_those_of_the_profile_seeds():
    chosen = load_samples("ocr", 4, seed=7)
    expected = [make_sample(PROFILE_SEEDS[7 + i], ("read", "query")[i % 2]) for i in range(4)]
    assert [s.answer for s in chosen.samples] == [s.answer for s in expected]
    assert [s.image.tobytes() for s in chosen.samples] == [s.image.tobytes() for s in expected]
    assert (chosen.name, chosen.skipped) == ("ocr", {})


def test_the_hash_tells_samples_apart():
    hashes = [load_samples("ocr", n, s).hash for n, s in [(2, 0), (2, 0), (3, 0), (2, 1)]]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert all(len(text) == 64 for text in hashes)


@pytest.mark.parametrize("side", [PICTURE_SIZE + 1, 448, 672])
def test_pages_hold_different_words_inside_the_picture(side):
    for sample in bundled_samples(6, 11, side):
        assert sample.image.size == (side, side)
        texts = [word.text for word in sample.words]
        assert len(set(texts)) == len(texts)
        assert 3 <= len(texts) < MAX_WORDS + side / 40
        assert said(sample) == texts
        for word in sample.words:
            x0, y0, x1, y1 = word.box
            assert 0 <= x0 < x1 <= side
            assert 0 <= y0 < y1 <= side


def test_larger_pages_hold_more():
    few, many = (len(bundled_samples(1, 0, side)[0].words) for side in (300, 560))
    assert few * 2 < many


def test_the_source_says_how_large_pages_are():
    chosen = load_samples("ocr-448", 2, 3)
    assert chosen.name == "ocr-448"
    assert [s.answer for s in chosen.samples] == [s.answer for s in bundled_samples(2, 3, 448)]
    assert load_samples("ocr-224", 2, 3).hash == load_samples("ocr", 2, 3).hash


@pytest.mark.parametrize(
    ("source", "count", "seed", "reason"),
    [
        ("ocr", 0, 0, "at least 1, got 0"),
        ("ocr", -3, 0, "at least 1, got -3"),
        ("ocr", 2, -1, "seed must be"),
        ("ocr", 2, 10**9 - 1, "seed must be 0 to 999999998"),
        ("ocr-100", 1, 0, "at least 224 pixels"),
        ("ocr-100000", 1, 0, "at most 4096, got 100000"),
        ("ocr-large", 1, 0, "no such file"),
    ],
)
def test_drawn_pictures_that_cannot_be(source, count, seed, reason):
    with pytest.raises(DataError, match=reason):
        load_samples(source, count, seed)
