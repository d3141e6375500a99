"""Every method's kept sets and totals, and what its arguments may be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_vllm.budget.capacities import head_capacities
from sparsemm_vllm.budget.methods import (
    METHODS,
    Budget,
    adakv_split,
    full,
    pyramidkv,
    random_heads,
    shorten_pyramid,
    snapkv,
    sparsemm,
)
from sparsemm_vllm.budget.random_scores import random_scores
from sparsemm_vllm.triton_kernels.reference import kept_tokens
from support.golden import (
    KEPT_SETS,
    KEPT_WHOLE,
    LAYERS,
    PRUNED,
    Case,
    capacities_of,
    differs_by_ties_only,
    golden_budget,
    lengths_of,
    published_kept,
)
from support.head_scores import SCORES


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("number", PRUNED)
@pytest.mark.parametrize("name", KEPT_SETS)
def test_kept_sets(name, number, layer):
    case = Case(number)
    assert case.layout().is_pruned(case.n)
    scores, window = case.scores(), set(range(case.n - case.window, case.n))
    lengths = lengths_of(METHODS[name], golden_budget(case), layer, case.n, scores)
    published = published_kept(case, name, layer)
    assert len(published) == case.Hkv
    for head, positions in enumerate(kept_tokens(scores, lengths)):
        mine = set(positions.tolist()) | window
        assert differs_by_ties_only(mine, published[head], scores[head]), f"head {head}"


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", KEPT_SETS)
def test_a_budget_larger_than_the_prompt_keeps_everything(name, layer):
    """The one rule, `is_pruned`, says of the unpruned prompt what all published code does."""
    case = Case(KEPT_WHOLE)
    assert not case.layout().is_pruned(case.n)
    assert published_kept(case, name, layer) == [set(range(case.n))] * case.Hkv


def test_full_keeps_all_of_a_pruned_prompt():
    case = Case(0)
    lengths = full(golden_budget(case))[1]
    older = case.n - case.window
    assert [len(head) for head in kept_tokens(case.scores(), lengths)] == [older] * case.Hkv


def test_random_methods_are_random_in_what_their_names_say():
    """`random` in the tokens of even heads, `random_heads` in the heads."""
    budget = Budget(SCORES, 2, 256)
    tokens, heads = METHODS["random"], METHODS["random_heads"]
    assert (tokens.capacities(budget) == 224).all()
    assert tokens.token_scores is random_scores
    assert torch.equal(heads.capacities(budget), random_heads(budget))
    assert heads.token_scores is None
    assert [name for name, method in METHODS.items() if method.split] == ["adakv"]


def test_no_published_set_is_left_out():
    stems = {name.rpartition("_")[0] for name in Case(0).data.files if name.endswith("_kept")}
    assert stems == {stem.format(layer) for stem in KEPT_SETS.values() for layer in range(LAYERS)}


def test_the_golden_heads_tell_adakv_from_snapkv():
    """Splits that equal the even one would prove nothing, nor would totals that are exact."""
    case = Case(2)
    split = adakv_split(case.scores(), case.budget - case.window)
    assert len(set(split.tolist())) > 1
    assert split.sum() != case.Hkv * (case.budget - case.window)


score_tables = st.tuples(st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 4, 7])).flatmap(
    lambda shape: st.integers(0, 2**32).map(
        lambda seed: (
            # Powers make few heads win most, as visual scores do.
            random_scores(seed, 0, range(shape[0]), shape[1] * shape[2]) ** 8 + 1e-9,
            shape[1],
        )
    )
)
bases = st.integers(1, 3000)


@given(score_tables, bases, st.integers(1, 64), st.integers(0, 6000), st.floats(0, 1))
def test_shape_type_and_total(table, base, window, more, rho):
    """For a pruned prompt; the total is the budget, each head's rounding aside."""
    scores, Hkv = table
    budget = Budget(scores, Hkv, window + base, window, rho)
    n = budget.tokens + more
    for name, method in METHODS.items():
        capacities = capacities_of(method, budget, n)
        L = len(scores)
        assert capacities.shape == (L, Hkv), name
        assert capacities.dtype == torch.int32, name
        assert capacities.min() >= 0, name
        mean = capacities.double().mean()
        if name == "full":
            assert (capacities >= n - window).all()
        elif name == "pyramidkv":
            assert base <= mean <= base + max(0, L - 2) / 2
        elif name in ("sparsemm", "random_heads"):
            assert abs(mean - base) <= 0.5
        else:
            assert (capacities == base).all(), name


def test_sparsemm_is_the_published_table(published):
    scores, tables = published
    ours = sparsemm(Budget(scores, 8, 256, 32, 0.3))
    assert ours.tolist() == tables["budget256_ratio0.3_group4"].tolist()


@given(score_tables, bases, st.floats(0, 1))
def test_more_budget_takes_from_no_head(table, base, rho):
    """PyramidKV's layers are no such case: its step grows at once for all of them."""
    scores, Hkv = table
    less, more = (Budget(scores, Hkv, 32 + base + extra, 32, rho) for extra in (0, 1))
    for method in (sparsemm, full, snapkv, random_heads):
        assert (method(more) >= method(less)).all(), method.__name__


@given(st.integers(2, 80), bases, st.integers(0, 6000), st.integers(1, 40))
def test_pyramid(layers, base, more, beta):
    """Steps down, all the same; nothing beyond the prompt; the last layer not below its share."""
    budget = Budget(torch.ones(layers, 3), 3, 32 + base)
    n = budget.tokens + more
    capacities = shorten_pyramid(pyramidkv(budget, beta), budget.base, n - 32)
    assert (capacities == capacities[:, :1]).all(), "the heads of a layer are alike"
    column = capacities[:, 0]
    steps = (column[:-1] - column[1:]).tolist()
    assert len(set(steps)) == 1
    assert steps[0] >= 0
    assert column[0] == min(2 * base - base // beta, n - 32)
    assert column[-1] >= base // beta


def test_pyramid_of_an_example():
    """B = 256, W = 32: 11 to 437 tokens, a step of 13 and not 13.7; then n - W = 300 caps it."""
    budget = Budget(torch.ones(32, 1), 1, 256)
    pyramid = pyramidkv(budget)
    assert pyramid[[0, 1, 31], 0].tolist() == [437, 424, 34]
    assert torch.equal(shorten_pyramid(pyramid, 224, 437), pyramid)
    assert shorten_pyramid(pyramid, 224, 300)[[0, 1, 31], 0].tolist() == [300, 296, 176]


def test_pyramid_of_one_layer_is_even():
    """The published code divides by zero."""
    pyramid = pyramidkv(Budget(torch.ones(1, 2), 2, 200))
    assert pyramid.tolist() == shorten_pyramid(pyramid, 168, 168).tolist() == [[168, 168]]


@pytest.mark.parametrize("beta", [0, -1])
def test_beta_below_one_is_refused(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}"):
        pyramidkv(Budget(SCORES, 2, 200), beta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 32}, "must be larger than the window"),
        ({"window": 0}, "window is 0"),
        ({"rho": 1.5}, "rho is 1.5"),
        ({"num_kv_heads": 3}, "multiple of 3 KV heads"),
        ({"scores": SCORES * 0}, "all zero"),
    ],
)
def test_a_budget_is_refused_before_a_method_sees_it(change, message):
    arguments = {"scores": SCORES, "num_kv_heads": 2, "tokens": 256}
    Budget(**arguments)
    with pytest.raises(ValueError, match=message):
        Budget(**(arguments | change))


def test_random_heads_favours_other_heads():
    """Same machinery as `sparsemm`: groups count together, another seed other heads."""
    budget = Budget(SCORES, 2, 256)
    ours = random_heads(budget)
    scores = torch.stack([random_scores(0, layer, range(4), 1)[:, 0] for layer in range(3)])
    assert torch.equal(ours, head_capacities(scores, 2, 256))
    assert len(set(ours.flatten().tolist())) > 3
    assert not torch.equal(ours, random_heads(budget, seed=1))
