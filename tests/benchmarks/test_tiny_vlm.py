"""What trains the small models: rows, attention, optimizer, text."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import train_instrument
import train_reader
from tiny_vlm import prose
from tiny_vlm.blocked_attention import blocked_attention
from tiny_vlm.glyphs import PATCH, patch_glyphs
from tiny_vlm.muon import Muon, orthogonalise
from tiny_vlm.rows import IGNORE, branch, branch_sight, pack_row
from tiny_vlm.vocabulary import ASSISTANT, BLANK, BOS, EOS, USER, VOCAB, encode
from torch.nn import functional as F

from sparsemm_vllm.data.pictures import DEMO_SEEDS, make_cluttered_page, read_sample


@pytest.fixture(autouse=True)
def _short_text(monkeypatch):
    """Collecting the training text takes ten seconds."""
    monkeypatch.setattr(train_instrument, "training_text", prose.held_out_text)


@pytest.mark.parametrize("script", [train_reader, train_instrument])
def test_a_batch_is_a_pure_function_of_the_step(script):
    first, again, other = (vars(script.make_batch(step, 2)) for step in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])


def test_branches_see_the_prefix_and_themselves_only():
    row = pack_row([BOS, USER], 1, [([5], [6, 7]), ([8], [9]), ([5] * 20, [6])], T=10, gap=100)
    assert row.ids.tolist() == [BOS, USER, 5, 6, 7, 8, 9, 0, 0, 0]
    assert row.labels.tolist() == [IGNORE, IGNORE, 6, 7, IGNORE, 9] + 4 * [IGNORE]
    assert row.positions.tolist() == [0, 1, 102, 103, 104, 102, 103, 0, 0, 0]
    assert row.segments.tolist() == [0, 0, 1, 1, 1, 2, 2, -1, -1, -1]
    sight = branch_sight(torch.from_numpy(row.segments)[None])[0]
    assert sight[6].nonzero()[:, 0].tolist() == [0, 1, 5, 6]
    assert sight.diagonal().all()


def test_the_system_message_is_learned_and_precedes_the_picture():
    rng = np.random.default_rng(1)
    page = make_cluttered_page(DEMO_SEEDS[0])
    row = train_instrument.make_row(rng, page)
    context = row.ids[1 : row.image - 1]
    assert row.labels[: len(context)].tolist() == context.tolist()
    assert row.ids[row.image - 1] == USER
    prompt, answer = branch(read_sample(page))
    start = row.image + train_instrument.P
    assert row.ids[start : start + len(prompt) + len(answer)].tolist() == prompt + answer
    assert (prompt[-1], answer[-1]) == (ASSISTANT, EOS)


def test_every_character_wins_a_patch_where_it_is():
    page = make_cluttered_page(DEMO_SEEDS[3])
    glyphs = patch_glyphs(page).reshape(page.image.height // PATCH, -1)
    for word in page.words:
        for letter, (x0, y0, x1, y1) in zip(word.text, word.char_boxes, strict=True):
            around = glyphs[y0 // PATCH : y1 // PATCH + 1, x0 // PATCH : x1 // PATCH + 1]
            assert VOCAB[letter] in around
    assert (glyphs == BLANK).any()


@pytest.mark.parametrize("length", [1, 111, 112, 113, 230])
def test_blocked_attention_is_attention(length):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 16, requires_grad=True) for _ in range(3)]
    seen = torch.rand(2, 1, length, length).lt(0.7).tril() | torch.eye(length, dtype=torch.bool)
    module = torch.nn.Module()
    out, _ = blocked_attention(module, *inputs, seen.float(), scaling=0.25)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=seen, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_blocked_attention_refuses_grouped_heads():
    query, key = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 2, 8)
    with pytest.raises(ValueError, match="one KV head a query head"):
        blocked_attention(torch.nn.Module(), query, key, key, torch.ones(1, 1, 2, 2), 1.0)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 6, 20), (1, 20, 6)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_moves_as_torchs_does():
    start = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([mine], lr=0.01, weight_decay=0.02),
        torch.optim.Muon(
            [theirs], lr=0.01, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", momentum=0.95
        ),
    ]
    for step in range(3):
        grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in zip((mine, theirs), optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    moved, expected = mine - start, theirs - start
    assert F.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.999  # bfloat16
    assert float(moved.norm()) == pytest.approx(float(expected.norm()), rel=0.02)


def test_positions_are_spread_over_a_larger_grid():
    corners = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert torch.equal(train_instrument.spread(corners, 2), corners)
    wider = train_instrument.spread(corners, 4)
    assert wider.shape == (16, 1)
    assert wider[[0, 3, 12, 15], 0].tolist() == pytest.approx([0, 1, 2, 3], abs=1e-5)


def test_training_text_is_documentation_in_plain_characters():
    docstrings = " ".join(prose.docstrings(Path(ast.__file__)))
    assert "abstract syntax" in docstrings.lower()
    assert min(map(len, prose.docstrings(Path(ast.__file__)))) >= prose.MIN_DOCSTRING
    assert prose.plain("a\n\tb  é—c") == "a b c"


def test_held_out_text_is_the_licence():
    held_out = prose.held_out_text()
    encode(held_out)  # printable characters only
    piece = prose.excerpt(held_out, np.random.default_rng(0), 80)
    assert len(piece) == 80
    assert f" {piece}" in held_out
