import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_vllm.commands.evaluate.metrics import (
    DRAWS,
    Marks,
    anls,
    draw_pictures,
    edit_distance,
    interval,
    words_right,
)

WORDS = st.text("abAB é", max_size=9)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ABCD", "BCDA", 2),
        ("same", "same", 0),
    ],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@given(WORDS, WORDS)
def test_edit_distance_is_levenshtein_s(a: str, b: str) -> None:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    assert edit_distance(a, b) == row[-1] == edit_distance(b, a)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("10 May", 1.0),
        (" 10 MAY ", 1.0),  # neither case nor blanks at the ends count
        ("10 Mai", 5 / 6),
        ("10 Jun", 0.0),  # three of six characters: not less than a half is wrong
        ("10 xay", 5 / 6),
        ("1O xay", 4 / 6),
        ("", 0.0),
        ("10 May 2026", 6 / 11),
        ("10 May 20261", 0.0),  # six of twelve
    ],
)
def test_anls(answer: str, value: float) -> None:
    assert anls(["10 May"], answer) == pytest.approx(value)


def test_anls_takes_the_nearest_truth() -> None:
    assert anls(["ten", "10 May", "May"], "10 Mai") == pytest.approx(5 / 6)
    assert anls([""], "") == 1.0


def test_words_count_in_their_place() -> None:
    assert words_right("A B C", "A B C") == 3
    assert words_right("A B C", "B C") == 0
    assert words_right("A B C", "A X C and more") == 2
    assert words_right("A B C", "") == 0


def test_marks_are_pooled_over_pictures() -> None:
    """Shares of all words and characters: a long text counts for more than a short one."""
    marks = Marks.of(["AA BB CC", "D"], ["AA BX CC ", "E"])
    found = marks.statistics()
    assert found["exact_words"] == 2 / 4
    assert found["character_errors"] == 2 / 9
    assert found["anls"] == pytest.approx((7 / 8 + 0) / 2)
    drawn = marks.statistics(np.array([[0, 0], [1, 1], [0, 1]]))
    np.testing.assert_allclose(drawn["exact_words"], [4 / 6, 0, 2 / 4])
    np.testing.assert_allclose(drawn["character_errors"], [2 / 16, 1, 2 / 9])


def test_draws_depend_on_the_seed_alone() -> None:
    draws = draw_pictures(7)
    assert draws.shape == (DRAWS, 7)
    assert set(draws.flat) == set(range(7))
    np.testing.assert_array_equal(draws, draw_pictures(7))
    assert (draws != draw_pictures(7, seed=1)).any()


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        right = (rng.random(200) < 0.7).astype(float)
        ones = np.ones(200)
        marks = Marks(right, ones, ones, ones, right)
        low, high = interval(marks.statistics(draw_pictures(200))["exact_words"])
        covered += low <= 0.7 <= high
    assert 88 <= covered <= 99
