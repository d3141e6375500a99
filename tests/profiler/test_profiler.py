"""A profile run without an engine: hits, reliability, interruption."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig, LlavaConfig

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.profiler import ProfilerError, run
from sparsemm_vllm.profiler.attention import Request, Scores, word_hits
from sparsemm_vllm.profiler.partial import Partial, Run
from sparsemm_vllm.profiler.reliability import ranks, samples_missing, spearman, split_half
from sparsemm_vllm.profiler.worker import gather_attention

RUN = Run("tiny", "hash", "forced", "ocr", "data", samples=5, seed=3)


# Hits


def test_a_head_that_looks_into_the_word_scores_its_share() -> None:
    patches = np.array([-1, 0, 1, 2, 3, -1])  # four image tokens, text before and behind
    inside = {0: np.array([1, 1, 0, 0], bool), 1: np.array([0, 0, 0, 1], bool)}
    keys = np.array([[[1, 3, 0], [2, 4, 5], [4, 4, 1], [1, 1, 1]]])  # [1, tokens, 3]
    hits = word_hits(keys, [0, 0, 1, None], patches, inside)
    np.testing.assert_allclose(hits, [[1 / 2 + 1 / 2 + 1, 1, 0]])


def test_what_was_not_recorded_or_lies_behind_the_prompt_is_no_hit() -> None:
    patches, inside = np.array([-1, 0, 1]), {0: np.array([1, 1], bool)}
    keys = np.array([[[-1, 3, 99, 2]]])
    np.testing.assert_allclose(word_hits(keys, [0], patches, inside), [[0, 0, 0, 0.5]])


def test_a_word_that_the_model_does_not_see_scores_nothing() -> None:
    patches, inside = np.array([0, 1]), {0: np.zeros(2, bool)}
    assert word_hits(np.zeros((1, 1, 2), int), [0], patches, inside).tolist() == [[0, 0]]


class Ranks:
    """Two pipeline stages of two tensor-parallel ranks, the third of five layers left out."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys

    def collective_rpc(self, method: str, args: tuple[int]) -> list[Any]:
        assert method == "read_attention"
        (rows,) = args
        own = [
            (layers, first, self.keys[layers, :rows, first : first + 3])
            for layers in ([0, 1], [3, 4])
            for first in (0, 3)
        ]
        return [[layers, first, 3, part.tobytes()] for layers, first, part in own]


def test_ranks_are_put_together() -> None:
    keys = np.random.default_rng(0).integers(0, 99, (5, 9, 6), dtype=np.int32)
    found = gather_attention(Ranks(keys), 7, 5, 6)
    expected = keys[:, :7].copy()
    expected[2] = -1
    np.testing.assert_array_equal(found, expected)


# Reliability


def test_ranks_of_equal_values_are_their_mean() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0, 1.0])).tolist() == [4.5, 1.5, 4.5, 3, 1.5]


def test_spearman() -> None:
    a = np.arange(5.0)
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # 1 - 6 * sum of squared differences of ranks / (n (n^2 - 1)), by hand.
    assert spearman(a, np.array([1.0, 0, 2, 4, 3])) == pytest.approx(1 - 6 * 4 / 120)
    assert spearman(a, np.zeros(5)) is None


def test_missing_samples_bring_the_correlation_that_was_promised() -> None:
    """Heads with true scores and noise in each sample: measured, not computed."""
    rng = np.random.default_rng(1)
    true = rng.normal(0, 1, (20, 30))

    def halves(samples: int) -> float:
        correlation = split_half(true + rng.normal(0, 6, (samples, 20, 30)))
        assert correlation is not None
        return correlation

    few = 60
    before = float(np.mean([halves(few) for _ in range(8)]))
    missing = samples_missing(few, before)
    assert before < 0.8
    assert missing is not None
    after = float(np.mean([halves(few + missing) for _ in range(4)]))
    assert after == pytest.approx(0.9, abs=0.03)


def test_nothing_is_missing_or_nothing_helps() -> None:
    assert samples_missing(100, 0.95) == 0
    assert samples_missing(100, 0.0) is None
    assert samples_missing(100, -0.2) is None
    assert split_half(np.ones((1, 2, 3))) is None


def test_halves_do_not_follow_the_order_of_the_samples() -> None:
    """Data may be sorted: first what some heads read, then what the others do."""
    easy, hard = np.linspace(0, 1, 24), np.linspace(1, 0, 24) ** 2
    hits = np.repeat([easy, hard], 200, axis=0).reshape(400, 4, 6)
    correlation = split_half(hits)
    assert correlation is not None
    assert correlation > 0.9
    assert spearman(easy, hard) == pytest.approx(-1)


# Interruption


def scores(count: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(rng.random((count, 2, 4), dtype=np.float32), rng.integers(1, 9, count))


def test_what_is_done_is_kept(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "p.partial", RUN)
    assert partial.load() is None
    partial.save(scores(3))
    partial.save(scores(4))
    found = partial.load()
    assert found is not None
    np.testing.assert_array_equal(found.hits, scores(4).hits)
    np.testing.assert_array_equal(found.tokens, scores(4).tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["p.partial"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_id", "other"), ("config_hash", "x"), ("mode", "free"), ("data_hash", "y"),
     ("samples", 6), ("seed", 4)],
)  # fmt: skip
def test_another_run_is_not_continued(tmp_path: Path, name: str, value: Any) -> None:
    Partial(tmp_path / "p", RUN).save(scores(3))
    other = Partial(tmp_path / "p", dataclasses.replace(RUN, **{name: value}))
    with pytest.raises(ProfilerError, match=f"its {name} is {getattr(RUN, name)!r}, this one's"):
        other.load()


def test_a_file_that_is_no_partial_run(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("{}")
    with pytest.raises(ProfilerError, match=r"cannot be read.*delete it"):
        Partial(tmp_path / "p", RUN).load()


class Scorer:
    """Stands in for `AttentionScorer`: scores that depend on the sample alone."""

    method = "of a test"
    shape = (2, 4, 2)
    batches: list[list[int]] = []  # noqa: RUF012
    rows = 10
    fails_at: int | None = None

    def __init__(self, llm: Any, mode: Any) -> None:
        type(self).batches = []

    def request(self, sample: Any) -> Request:
        return Request(sample, self.rows, 1)

    def score(self, requests: list[Request]) -> Scores:
        numbers = [int(request.sample) for request in requests]
        if self.fails_at in numbers:
            raise KeyboardInterrupt
        self.batches.append(numbers)
        parts = [scores(1, seed=number) for number in numbers]
        return Scores(
            np.concatenate([p.hits for p in parts]), np.concatenate([p.tokens for p in parts])
        )


class Model:
    """Stands in for `vllm.LLM`."""

    class llm_engine:  # noqa: N801
        class model_config:  # noqa: N801
            dtype = "torch.float32"


@dataclasses.dataclass
class Samples:
    samples: list[int]
    name: str = "ocr"
    hash: str = "data"


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> type[Scorer]:
    monkeypatch.setattr(run, "AttentionScorer", Scorer)
    monkeypatch.setattr(run, "BATCH", 2)
    monkeypatch.setattr(Scorer, "fails_at", None)
    return Scorer


def measure(partial: Partial | None = None, done: Scores | None = None) -> tuple[Any, list[int]]:
    seen: list[int] = []
    profile = run.profile_engine(Model, Samples(list(range(5))), RUN, partial, done, seen.append)
    return profile.model_copy(update={"created": None}), seen


def test_a_continued_run_gives_what_an_uninterrupted_one_does(
    scorer: type[Scorer], tmp_path: Path
) -> None:
    whole, seen = measure()
    assert scorer.batches == [[0, 1], [2, 3], [4]]
    assert seen == [0, 2, 4, 5]
    partial = Partial(tmp_path / "p", RUN)
    scorer.fails_at = 3
    with pytest.raises(KeyboardInterrupt):
        measure(partial)
    scorer.fails_at = None
    again, seen = measure(partial, partial.load())
    assert scorer.batches == [[2, 3], [4]], "the first batch was done"
    assert again == whole
    assert seen[-1] == 5
    expected = np.mean([scores(1, seed=i).hits[0] for i in range(5)], axis=0)
    np.testing.assert_allclose(np.array(whole.scores), expected, atol=1e-6)


def test_batches_fit_into_the_workers_buffer(
    scorer: type[Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROWS", 10)
    measure()
    assert scorer.batches == [[i] for i in range(5)]
    monkeypatch.setattr(run, "ROWS", 9)
    with pytest.raises(ProfilerError, match="sample 1 records 10 tokens of its answer, 9 at most"):
        measure()


@pytest.mark.parametrize(
    ("hits", "tokens", "message"),
    [(0, 0, "no token of an answer belongs to a word"), (0, 3, "no head looked at the word")],
)
def test_no_profile_of_zeros(
    scorer: type[Scorer], monkeypatch: pytest.MonkeyPatch, hits: int, tokens: int, message: str
) -> None:
    def score(self: Scorer, requests: list[Request]) -> Scores:
        count = len(requests)
        return Scores(np.full((count, 2, 4), hits, np.float32), np.full(count, tokens))

    monkeypatch.setattr(Scorer, "score", score)
    with pytest.raises(ProfilerError, match=message):
        measure()


# The model's configuration


def llava_config(**text: Any) -> LlavaConfig:
    return LlavaConfig(text_config=LlamaConfig(**{"hidden_size": 64, **text}))


def test_config_hash_is_the_architectures(tmp_path: Path) -> None:
    config = llava_config()
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"_name_or_path": "/elsewhere", "transformers_version": "4.0.0", "torch_dtype": "half"}
    raw["text_config"] |= {"max_position_embeddings": 77, "use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert config_hash(AutoConfig.from_pretrained(tmp_path)) == config_hash(config)
    for text in ({"hidden_size": 128}, {"num_key_value_heads": 4}, {"vocab_size": 100}):
        assert config_hash(llava_config(**text)) != config_hash(config)
    assert config_hash(LlamaConfig()) != config_hash(config)
