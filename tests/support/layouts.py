"""Layouts that hypothesis draws."""

from hypothesis import strategies as st

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.random_scores import random_scores

W = 4

PRUNING = [name for name, method in METHODS.items() if method.prunes]


@st.composite
def method_layouts(draw):
    """Any method, budget and spread over ranks; few heads have most of the score."""
    L, Hkv, G = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    name = draw(st.sampled_from(PRUNING))
    cut = draw(st.integers(0, L - 1))
    ranks = [r for r in (1, 2, 4) if Hkv % r == 0 and (r == 1 or not METHODS[name].split)]
    scores = random_scores(draw(st.integers(0, 999)), 0, range(L), Hkv * G) ** 8 + 1e-9
    return CacheLayout.from_scores(
        scores,
        Hkv,
        W + draw(st.one_of(st.integers(1, 9), st.integers(1, 200))),
        W,
        draw(st.sampled_from([0.0, 0.1, 1.0])),
        name,
        redistribute=draw(st.booleans()),
        min_prompt_tokens=draw(st.sampled_from([0, 0, 50])),
        stages=((0, cut), (cut, L)) if cut else (),
        tensor_parallel=draw(st.sampled_from(ranks)),
    )


BASE = 6
# Per layer and head; with pages of 16: none, one token, a page less one, a page, a page and one,
# several, and more than any prompt here has.
CAPACITIES = (
    (0, 1, 15, 16),
    (17, 0, 33, 160),
    (1, 5000, 3, 2),
    (48, 47, 49, 0),
)


def make_layout(**options):
    return CacheLayout(CAPACITIES, window=W, base=BASE, **options)
