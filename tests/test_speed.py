"""The benchmarks of speed, without engines: arithmetic, tables, and runs in pieces."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import decode_latency
import prefill_cost
import report
from decode_latency import Pair, Plan
from speed.command import measure_cells
from speed.engines import Engine, Timing, _step_ms, random_prompts
from speed.results import Deadline, Results
from speed.subject import Subject, reader

ASKED = {"model": "m", "lengths": (1, 2)}
VICUNA = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32064,
)  # fmt: skip
QWEN = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, vocab_size=152064,
)  # fmt: skip


def subject(config: Any) -> Subject:
    return Subject("m", Path(), "none", 32, 2, config)


@pytest.mark.parametrize(
    ("config", "token_kib", "weights_gb"), [(VICUNA, 512, 13.2), (QWEN, 56, 14.1)]
)
def test_bytes_of_a_step(config, token_kib, weights_gb):
    assert subject(config).token_bytes == token_kib * 1024
    assert subject(config).weight_bytes / 1e9 == pytest.approx(weights_gb, abs=0.1)


def test_bytes_of_the_bundled_model():
    own = reader()
    assert own.token_bytes == 6 * 4 * 2 * own.config.head_dim * 4
    assert 4e6 < own.weight_bytes < 4 * 5e6, "4.8 million parameters, the tower among them"


# Results in pieces


class Left(Deadline):
    """Over when it has been asked so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    @property
    def left(self) -> float:
        self.times -= 1
        return self.times + 1


def test_cells_are_kept_and_not_measured_again(tmp_path):
    file = tmp_path / "folder" / "r.json"
    results = Results(file, ASKED, cpu=True)
    asked: list[str] = []
    cells = {name: lambda name=name: asked.append(name) or {"n": name} for name in "abc"}
    assert not measure_cells(results, cells, Left(2))
    assert asked == ["a", "b"]
    again = Results(file, ASKED, cpu=True)
    assert measure_cells(again, cells, Deadline(60))
    assert asked == ["a", "b", "c"]
    saved = json.loads(file.read_text())
    assert [saved["cells"][name]["n"] for name in "abc"] == ["a", "b", "c"]
    assert {"device", "vllm", "torch", "commit"} <= saved["machine"].keys()


def test_a_cell_that_fails_loses_no_other(tmp_path):
    file = tmp_path / "r.json"
    results = Results(file, ASKED, cpu=True)

    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_cells(results, {"a": lambda: {"n": 1}, "b": fails}, Deadline(60))
    assert list(Results(file, ASKED, cpu=True).cells) == ["a"]


def test_other_settings_are_not_mixed(tmp_path):
    file = tmp_path / "r.json"
    Results(file, ASKED, cpu=True).save("a", {})
    with pytest.raises(SystemExit, match="holds other measurements; give another --out"):
        Results(file, ASKED | {"model": "other"}, cpu=True)


# Decoding


def test_step_time_counts_tokens_not_outputs():
    """Two requests; the third step came in two parts, the last brought two tokens each."""
    marks = [(0.0, 10), (0.1, 12), (0.2, 14), (0.25, 15), (0.3, 16), (0.5, 20)]
    assert _step_ms(marks, 2) == pytest.approx(100)


class Answering(Engine):
    """An engine whose steps give every request a token; two of them come late."""

    def __init__(self, tokens: int) -> None:
        self._asked, self._usage = 0, 0.25
        self._engine = SimpleNamespace(
            add_request=self.add,
            has_unfinished_requests=lambda: any(v < tokens for v in self.counts.values()),
            step=self.step,
            vllm_config=SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=41)),
        )
        self.counts: dict[str, int] = {}
        self.tokens = tokens

    def add(self, name: str, prompt: Any, params: Any) -> None:
        self.counts[name] = -len(self.counts)  # a prefill after the other

    def step(self) -> list[Any]:
        for name in self.counts:
            self.counts[name] = min(self.counts[name] + 1, self.tokens)
        return [
            SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[7] * count)])
            for name, count in self.counts.items()
            if count > 0
        ]


def test_only_steps_in_which_all_decode_are_timed():
    timing = Answering(tokens=8).ask([[1], [2], [3]], 8)
    assert timing.held_blocks == 10
    assert timing.step_ms > 0
    assert timing.first_token_s > 0


def test_requests_that_never_decode_together():
    with pytest.raises(RuntimeError, match="never decode together"):
        Answering(tokens=3).ask([[1], [2], [3]], 3)


@pytest.fixture
def pair() -> Pair:
    made = object.__new__(Pair)
    made.subject, made.method, made.plan = reader(), "sparsemm", Plan(budgets=(64,), tokens=8)
    made.bandwidth = 1e9
    made.dense = SimpleNamespace(blocks=100)
    return made


def test_figures_of_a_cell(pair):
    timings = [Timing(0.1, ms, 50) for ms in (30.0, 10.0, 20.0)]
    figures = pair.figures("sparsemm-64", 640, 2, timings)
    token, layout = pair.subject.token_bytes, pair.subject.layout(64, "sparsemm")
    assert (figures["fastest_ms"], figures["step_ms"], figures["slowest_ms"]) == (10, 20, 30)
    assert figures["kept_tokens"] == pytest.approx(layout.mean_kept(640), abs=0.05)
    assert figures["ideal_kv_bytes"] == pytest.approx(2 * (layout.mean_kept(640) + 4) * token)
    floor = (pair.subject.weight_bytes + figures["ideal_kv_bytes"]) / 1e9
    assert figures["floor_ms"] == pytest.approx(1e3 * floor, rel=1e-3)
    assert figures["kv_bytes"] == 50 * 16 * token
    assert pair.figures("dense", 640, 2, timings)["kept_tokens"] == 640


def test_a_cell_that_dense_attention_cannot_hold_is_skipped(pair):
    """101 blocks of 16 tokens, and 100 in the pool."""
    cell = pair.measure(16 * 101 - 8, 1)
    assert cell == {"dense_lacks_bytes": 16 * pair.subject.token_bytes}


def test_both_methods_are_measured_in_pieces(tmp_path, monkeypatch):
    opened: list[str] = []

    class Fake:
        def __init__(self, subject: Any, method: str, plan: Plan, options: Any) -> None:
            opened.append(method)
            self.method = method

        def measure(self, n: int, batch: int) -> dict[str, Any]:
            return {"dense": {}, self.method: {}}

        def close(self) -> None:
            opened.append("closed")

    monkeypatch.setattr(decode_latency, "Pair", Fake)
    plan = Plan(lengths=(1, 2), batches=(3,))
    results = Results(tmp_path / "r.json", ASKED, cpu=True)
    results.save("sparsemm n=1 batch=3", {"dense": {}})
    assert not decode_latency.measure(None, plan, results, Deadline(-1), {})
    assert opened == []
    assert decode_latency.measure(None, plan, results, Deadline(60), {})
    assert opened == ["sparsemm", "closed", "snapkv", "closed"]
    assert len(results.cells) == 4
    assert decode_latency.measure(None, plan, results, Deadline(-1), {}), "all is there"


def test_tables(pair, tmp_path):
    results = Results(tmp_path / "r.json", ASKED, cpu=True)
    timings = [Timing(0.1, 20.0, 50)]
    cell = {v: pair.figures(v, 640, 2, timings) for v in pair.variants}
    results.save("sparsemm n=640 batch=2", cell)
    results.save("snapkv n=32768 batch=32", {"dense_lacks_bytes": 444 << 20})
    lines = decode_latency.table(results).splitlines()
    assert lines[2].split()[:5] == ["640", "2", "sparsemm-64", "20.000", "1.00"]
    assert lines[3].split()[:3] == ["32768", "32", "snapkv"]
    assert lines[3].endswith("dense KV needs 444.0 MiB more")
    shares = Results(tmp_path / "p.json", ASKED, cpu=True)
    shares.save("n=640", {"dense_s": 0.2, "pruned_s": 0.21, "prune_share": 0.05, "shares": []})
    assert prefill_cost.table(shares).splitlines()[1].split() == ["640", "0.2000", "0.2100", "5.0%"]


def test_the_prune_is_the_difference_of_neighbours():
    """A machine that slows down does not look like a prune."""
    times = iter([9.0, 9.0, 1.0, 1.1, 2.0, 2.1, 3.0, 3.1])  # the first pair warms up
    engine: Any = SimpleNamespace(ask=lambda *_: Timing(next(times), 0.0, 0))
    cell = prefill_cost.measure(engine, 200, 10, rounds=3)
    assert cell["prune_share"] == pytest.approx(0.1 / 2)
    assert (cell["dense_s"], cell["pruned_s"]) == (2.0, 2.1)


def test_prompts_differ():
    prompts = random_prompts(50, 4, 500, seed=1) + random_prompts(50, 4, 500, seed=2)
    assert len({tuple(prompt) for prompt in prompts}) == 100
    assert all(0 <= token < 490 for prompt in prompts for token in prompt)


# What is shown


def test_the_readmes_tables_are_the_results():
    text = (Path(report.ROOT) / "README.md").read_text()
    assert report.with_tables(text) == text, "run benchmarks/report.py readme"
    with pytest.raises(ValueError, match="markers of the table accounting are missing"):
        report.with_tables("# A README\n")


def test_decode_curves(pair, tmp_path):
    results = Results(tmp_path / "r.json", ASKED, cpu=True)
    times = {"dense": 20.0, "sparsemm-64": 9.0}
    cells = {v: pair.figures(v, 640, 2, [Timing(0.1, ms, 50)]) for v, ms in times.items()}
    results.save("sparsemm n=640 batch=2", cells)
    results.save("snapkv n=640 batch=2", {"dense": cells["dense"] | {"step_ms": 99.0}})
    results.save("snapkv n=1280 batch=2", {"dense_lacks_bytes": 1})
    points = report.decode_points(results.data)
    assert [step for _, step, _ in points[2]["dense"]] == [20.0], "dense is drawn once"
    assert points.keys() == {2}
    report.draw_decode(results.data, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
