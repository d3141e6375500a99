"""Text-only models: with even budgets and with scores of one's own, and with mixed attention."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.commands.import_scores import import_scores
from support.engines import BLOCK, WINDOW, Engine, ask, assert_same, assert_same_kept, settings
from support.tiny import (
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    make_gemma3,
    make_llama,
    make_llama4,
    skewed_profile,
)

pytestmark = pytest.mark.engine

BUDGET = 40
TOKENS = 12
TEXT = "<s>" + "a text without any picture. " * 6  # 171 tokens
OTHER = "<s>" + "another one, with digits: 0123456789. " * 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine without the prefix cache and without chunks, whose prompts may be embeddings."""
    folder = tmp_path_factory.mktemp("scores")
    scores = {
        f"{layer}-{head}": [score, 0.0]
        for layer, row in enumerate(skewed_profile().scores)
        for head, score in enumerate(row)
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    profile = import_scores(folder / "scores.json", "tiny", num_kv_heads=KV_HEADS)
    return Engine(
        llama,
        settings(BUDGET, folder / "kept", profile=profile.model_dump(mode="json")),
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        enable_prompt_embeds=True,
    )


@pytest.fixture(scope="module")
def oracle(llama: Path, plain: Engine) -> Oracle:
    return Oracle(llama, plain.layout)


def test_imported_scores(plain: Engine, oracle: Oracle) -> None:
    (answer,) = plain.generate(ask(TEXT), max_tokens=TOKENS)
    tokens, logprobs = oracle.generate(TEXT, [], TOKENS)
    assert answer.tokens == tokens
    np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
    kept = plain.kept(answer)
    assert_same_kept(kept, {head: positions.numpy() for head, positions in oracle.kept.items()})
    assert len({len(positions) for positions in kept.values()}) > 4
    (again,) = plain.generate(ask(TEXT), max_tokens=TOKENS)
    assert again.cached_tokens == 0
    assert_same(again, answer)


def test_even_budgets(plain: Engine, oracle: Oracle) -> None:
    imported = plain.layout
    even = CacheLayout.from_scores(torch.ones(LAYERS, QUERY_HEADS), KV_HEADS, BUDGET, WINDOW)
    plain.use(even)
    oracle.layout = even
    (answer,) = plain.generate(ask(TEXT), max_tokens=TOKENS)
    assert answer.tokens == oracle.generate(TEXT, [], TOKENS)[0]
    assert {len(positions) for positions in plain.kept(answer).values()} == {BUDGET - WINDOW}
    plain.use(imported)
    oracle.layout = imported


def test_prompt_embeddings(plain: Engine, oracle: Oracle) -> None:
    """A prompt given as embeddings is pruned as the same prompt given as text."""
    (expected,) = plain.generate(ask(TEXT), max_tokens=TOKENS)
    tokens = torch.tensor(oracle.processor(TEXT)["input_ids"])
    embeddings = oracle.model.get_input_embeddings()(tokens).detach()
    (answer,) = plain.generate({"prompt_embeds": embeddings}, max_tokens=TOKENS)
    assert_same(answer, expected)
    assert_same_kept(plain.kept(answer), plain.kept(expected))
    assert plain.all_free()


MIXED = {"Gemma 3": make_gemma3, "Llama 4": make_llama4}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_attention(name: str, tmp_path: Path) -> None:
    """Layers with a sliding window or with chunks keep theirs, the others are pruned."""
    model = MIXED[name](tmp_path / "model")
    engine = Engine(model, settings(BUDGET, tmp_path / "kept"))
    oracle = Oracle(model, engine.layout)
    assert len(engine.layout.capacities) == LAYERS // 2
    (cold,) = engine.generate(ask(TEXT), max_tokens=24)
    n = cold.prompt_tokens
    tokens, logprobs = oracle.generate(TEXT, [], 24)
    assert len(set(tokens)) > 4, "the model repeats itself: this shows nothing"
    assert cold.tokens == tokens
    np.testing.assert_allclose(cold.logprobs, logprobs, atol=1e-4)
    kept = {head: positions.numpy() for head, positions in oracle.kept.items()}
    assert_same_kept(engine.kept(cold), kept)
    assert len(kept) == LAYERS // 2 * KV_HEADS
    (cached,) = engine.generate(ask(TEXT), max_tokens=24)
    assert cached.cached_tokens == (n - WINDOW) // BLOCK * BLOCK
    assert_same(cached, cold)
    engine.forget()
    for answer in engine.generate(ask(TEXT), ask(OTHER), ask(TEXT), max_tokens=24, chunk=50)[::2]:
        assert_same(answer, cold)
        assert_same_kept(engine.kept(answer), kept)
    assert engine.all_free()
    cache = engine.state.cache.tensor
    assert cache[:, 1:].isnan().any()
    assert not cache[:, 0].isnan().any(), "poison_freed leaves what vLLM reads and masks"
