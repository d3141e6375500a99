"""The offline evaluation: masks that stand for pruned caches, and its statistics."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from offline.curves import crossing, needed
from offline.heads import silenced
from offline.model import OfflineModel
from offline.plots import plot_curves, plot_heads
from offline.pruning import REDISTRIBUTED, held_tokens, shown_tokens, without_head
from offline.subjects import Questions
from PIL import Image
from tiny_vlm.answers import Reader
from tiny_vlm.visual_scores import concentration, rank_correlation

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.profile import load_profile
from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.commands.evaluate.metrics import DRAWS, Marks, draw_pictures
from sparsemm_vllm.data.pictures import DEMO_SEEDS, make_sample

READER = Path(str(files("sparsemm_vllm"))) / "reader"
WINDOW, BUDGET = 16, 48
SAMPLES = [make_sample(DEMO_SEEDS[0], "read"), make_sample(DEMO_SEEDS[1], "query")]
ANSWERS = [sample.answer for sample in SAMPLES]


@pytest.fixture(scope="module")
def model() -> OfflineModel:
    return OfflineModel(READER, WINDOW)


@pytest.fixture(scope="module")
def prompts(model):
    return model.prompts(SAMPLES)


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    return load_profile("sparsemm-reader").tensor()


def test_prompts_of_different_lengths_are_padded_on_the_left(prompts):
    assert prompts.lengths[0] < prompts.lengths[1] == prompts.columns
    shown = prompts.everything()
    assert shown[:, 0].sum(-1).eq(prompts.lengths[0]).all()
    assert shown[:, 0, :, -prompts.lengths[0] :].all()


@pytest.mark.parametrize("method", ["sparsemm", "snapkv", "adakv", f"sparsemm{REDISTRIBUTED}"])
def test_a_budget_as_large_as_the_prompt_is_dense(model, prompts, scores, method):
    shown = shown_tokens(prompts, method, scores, budget=prompts.columns + 1)
    assert torch.equal(shown, prompts.everything())


def test_a_dense_cache_answers_as_stock_transformers(model, prompts):
    stock = Reader(READER, torch.float32).answer(SAMPLES)
    assert model.answer(prompts, prompts.everything(), ANSWERS) == stock


def test_kept_tokens_and_answers_are_those_of_the_engines_oracle(model, prompts, scores):
    layout = CacheLayout.from_scores(scores, model.Hkv, BUDGET, WINDOW)
    shown = shown_tokens(prompts, "sparsemm", scores, BUDGET)
    answers = model.answer(prompts, shown, ANSWERS)
    oracle = Oracle(READER, layout)
    for row, sample in enumerate(SAMPLES):
        text = model.reader.prompt(sample.question)
        tokens, _ = oracle.generate(text, [sample.image], 10)
        older = prompts.lengths[row] - WINDOW
        for (layer, head), positions in oracle.kept.items():
            mine = shown[layer, row, head, -prompts.lengths[row] :]
            assert mine[older:].all()
            assert mine[:older].nonzero()[:, 0].tolist() == positions.tolist(), (layer, head)
        said = model.reader.processor.decode(tokens, skip_special_tokens=True)
        assert answers[row].startswith(said)


def test_held_tokens_are_the_layouts(prompts, scores):
    shown = shown_tokens(prompts, "sparsemm", scores, BUDGET)
    layout = CacheLayout.from_scores(scores, shown.shape[2], BUDGET, WINDOW)
    expected = [layout.mean_kept(n) for n in prompts.lengths]
    assert held_tokens(shown).tolist() == pytest.approx(expected)


def test_redistribution_holds_the_nominal_budget(prompts, scores):
    budget = 128  # at which some heads are capped by the prompt
    plain, shared = (
        held_tokens(shown_tokens(prompts, f"sparsemm{end}", scores, budget))
        for end in ("", REDISTRIBUTED)
    )
    assert (plain < budget - 1).all()
    torch.testing.assert_close(shared, torch.full_like(shared, budget), atol=0.2, rtol=0)


def test_a_knock_out_hides_one_head_but_for_its_window(prompts):
    hidden = prompts.everything() & ~without_head(prompts, 2, 1)
    assert hidden.any((1, 3)).nonzero().tolist() == [[2, 1]]
    assert hidden[2, :, 1].sum(-1).tolist() == [n - WINDOW for n in prompts.lengths]


def test_the_true_answers_loss_rises_when_everything_is_hidden(model, prompts):
    dense = model.answer_loss(prompts, prompts.everything(), ANSWERS)
    blind = prompts.everything()
    blind[..., : prompts.columns - WINDOW] = False
    assert (dense < 0.5).all()
    assert (model.answer_loss(prompts, blind, ANSWERS) > dense + 1).all()


def test_a_silenced_head_changes_the_prompt_and_leaves_no_trace(model, prompts):
    model.silenced[1, 3] = True
    silent = model.prompts(SAMPLES)
    model.silenced[1, 3] = False
    assert not torch.allclose(silent.logits, prompts.logits)
    assert torch.equal(silent.keys[1], prompts.keys[1])  # computed before the head's output
    assert not torch.equal(silent.keys[2], prompts.keys[2])
    assert torch.equal(model.prompts(SAMPLES).logits, prompts.logits)


@pytest.mark.parametrize(
    ("accuracy", "size"),
    [
        ([0.1, 0.5, 0.9, 1.0], 128 * 2**0.5),  # halfway, on the logarithm, to the next point
        ([1.0, 1.0, 1.0, 1.0], 32.0),  # the smallest is enough
        ([0.98, 0.5, 0.94, 0.96], 128 * 2**0.5),  # what counts is where it stays above
    ],
)
def test_crossing_is_where_a_curve_stays_above(accuracy, size):
    held = np.array([32.0, 64.0, 128.0, 256.0])
    assert crossing(held, np.array(accuracy), 0.95) == pytest.approx(size)


def test_what_a_method_needs_uses_its_held_size_not_its_budget():
    half, whole = (Marks.of(["AB CD"] * 50, [answer] * 50) for answer in ("AB", "AB CD"))
    need = needed([(40.0, half), (90.0, whole)], (200.0, whole), draw_pictures(50))
    assert need.shape == (DRAWS + 1,)
    assert (need > 40).all()
    assert (need <= 90).all()


def test_silencing_the_best_heads_stops_the_reading(model, scores):
    found = silenced(model, Questions(SAMPLES, None), scores, draws=1)
    assert found["heads"] == 2
    assert found["dense"] == 1.0
    assert found["visual"] < 0.5
    assert found["visual_95"][0] <= found["visual"] <= found["visual_95"][1]
    assert found["each_random"] == [found["random"]]
    assert not model.silenced.any()


def test_rank_correlation_and_concentration():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert rank_correlation(a, a.exp()) == 1.0
    assert rank_correlation(a, -a) == -1.0
    assert rank_correlation(torch.tensor([1.0, 1, 2]), torch.tensor([5.0, 5, 7])) == 1.0
    assert concentration(torch.arange(20.0)) == {"5%": 0.1, "10%": 0.1947, "20%": 0.3684}


def point(task, method, held, exact):
    return {
        "task": task,
        "method": method,
        "held_bytes": held,
        "exact_words": exact,
        "exact_words_95": [exact - 0.05, exact + 0.05],
    }


def test_results_become_pictures(tmp_path):
    about = {"model": "reader", "pictures": 300, "window": WINDOW}
    records = [
        point(task, method, held, exact)
        for task in ("read", "query")
        for method, held, exact in (
            ("full", 800_000, 0.95),
            ("sparsemm", 100_000, 0.4),
            ("sparsemm", 200_000, 0.9),
            ("snapkv", 200_000, 0.3),
        )
    ]
    plot_curves(about | {"records": records}, tmp_path / "curves.png")
    task_heads = {
        "silenced": {
            "heads": 2,
            "dense": 0.9,
            "visual": 0.2,
            "random": 0.8,
            "each_random": [0.7, 0.9],
        },
        "knock_outs": {
            "loss_rise": [[0.1, -0.01], [0.0, 2.0]],
            "visual_score_against_loss_rise": 0.5,
        },
    }
    scores = np.array([[1.0, 0.0], [2.0, 5.0]])
    document = about | {"read": task_heads, "query": task_heads}
    plot_heads(document, scores, scores.T, tmp_path / "heads.png")
    plot_heads(about | {"query": task_heads}, scores, scores.T, tmp_path / "one-task.png")
    for name in ("curves.png", "heads.png", "one-task.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 1000
