"""The benchmarks of speed, without engines: arithmetic, tables, and runs in pieces."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decode_latency
import prefill_cost
import pytest
import report
from decode_latency import NO_DENSE, SMALL, Plan, Rivals
from speed.command import measure_groups
from speed.engines import Engine, Timing, _step_ms, random_prompts
from speed.results import Deadline, Results
from speed.subject import GIB, Subject, copy_bandwidth, reader
from speed.variants import FOUR, VARIANTS, ratios, served_here
from transformers import LlamaConfig, Qwen2Config

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
    cells = {name: lambda _, name=name: asked.append(name) or {"n": name} for name in "abc"}
    assert not measure_groups(results, [(nullcontext, cells)], Left(3))
    assert asked == ["a", "b"]
    again = Results(file, ASKED, cpu=True)
    assert measure_groups(again, [(nullcontext, cells)], Deadline(60))
    assert asked == ["a", "b", "c"]
    saved = json.loads(file.read_text())
    assert [saved["cells"][name]["n"] for name in "abc"] == ["a", "b", "c"]
    assert {"device", "vllm", "torch", "commit"} <= saved["machine"].keys()


def test_a_cell_that_fails_loses_no_other(tmp_path):
    file = tmp_path / "r.json"
    results = Results(file, ASKED, cpu=True)

    def fails(_: Any) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    cells = {"a": lambda _: {"n": 1}, "b": fails}
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_groups(results, [(nullcontext, cells)], Deadline(60))
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


H100, H200 = 79 * GIB, 140 * GIB  # bytes, about


def names(groups: list[list[Any]]) -> list[list[str]]:
    return [[variant.name for variant in group] for group in groups]


def test_engines_are_open_side_by_side_as_far_as_memory_goes():
    """Each has its weights; a dense pool fills an H100 nearly alone."""
    vicuna = subject(VICUNA)
    assert names(Plan().fitted(H200, vicuna).groups(H200, vicuna)) == [
        ["dense", "sparsemm"],
        ["dense-fp8", "sparsemm-fp8"],
        ["snapkv"],
    ]
    small = Plan().fitted(H100, vicuna)
    assert [len(group) for group in small.groups(H100, vicuna)] == [1] * 5
    assert 55 < small.dense_gib < 60
    assert small.pruned_gib == Plan().pruned_gib
    assert len(Plan().groups(None, vicuna)) == 1
    four = Plan(dense_gib=16, pruned_gib=8, variants=FOUR)
    assert names(four.groups(H100, vicuna)) == [
        ["dense", "dense-fp8"],
        ["sparsemm", "sparsemm-fp8"],
    ]


def test_a_model_that_does_not_fit_a_device():
    with pytest.raises(SystemExit, match="m does not fit 16 GiB"):
        Plan().fitted(16 * GIB, subject(VICUNA))


def test_pools_have_equal_bytes_so_that_fp8_holds_twice_the_tokens():
    """Blocks of 16 tokens: 8 MiB of bf16, 4 MiB of fp8; one of the pool's holds nothing."""
    vicuna, plan = subject(VICUNA), Plan(dense_gib=1, tokens=16, variants=FOUR)
    assert plan.pool_gib(VARIANTS["dense"]) == plan.pool_gib(VARIANTS["dense-fp8"])
    assert plan.pool_gib(VARIANTS["sparsemm"]) == plan.pool_gib(VARIANTS["sparsemm-fp8"])
    assert plan.lacks(vicuna, 16 * 126, 1) == {}
    assert plan.lacks(vicuna, 16 * 127, 1) == {"dense": 8 << 20}
    assert plan.lacks(vicuna, 16 * 254, 1) == {"dense": 128 * 8 << 20}
    assert plan.lacks(vicuna, 16 * 255, 1) == {"dense": 129 * 8 << 20, "dense-fp8": 4 << 20}


def test_engines_differ_in_backend_and_cache_only(monkeypatch):
    """The options that vLLM gets."""
    opened: dict[str, Any] = {}
    monkeypatch.setattr(decode_latency, "Engine", dict)
    monkeypatch.setattr(prefill_cost, "Engine", dict)
    for name in FOUR:
        opened[name] = decode_latency.open_engine(reader(), VARIANTS[name], SMALL, {"seed": 1})
        options = opened[name]
        assert (options["attention_backend"], "additional_config" in options) == {
            "dense": ("CPU_ATTN", False),
            "sparsemm": ("SPARSEMM", True),
        }[name.removesuffix("-fp8")]
        assert options.get("kv_cache_dtype") == ("fp8" if name.endswith("fp8") else None)
        assert (options["seed"], options["max_model_len"]) == (1, 640 + 12 + 1)
        alone = prefill_cost.open_engine(reader(), VARIANTS[name], (8,), {})
        assert alone["attention_backend"] == options["attention_backend"]
        assert (alone["seed"], alone["max_model_len"]) == (0, 8 + 2)
    settings = opened["sparsemm"]["additional_config"]["sparsemm"]
    assert (settings["budget"], settings["max_request_budget"]) == SMALL.budgets
    for name in ("dense", "sparsemm"):
        assert opened[f"{name}-fp8"] == opened[name] | {"kv_cache_dtype": "fp8"}


def rivals(plan: Plan, *variants: str) -> Rivals:
    """Without engines; each asks for 20 ms and holds 50 blocks."""
    made = object.__new__(Rivals)
    made.subject, made.plan, made.bandwidth = reader(), plan, 1e9
    engine = SimpleNamespace(ask=lambda prompts, tokens, extra: Timing(0.1, 20.0, 50))
    made.engines = dict.fromkeys(variants, engine)
    return made


PLAN = Plan(budgets=(64,), tokens=8, dense_gib=101 * 96 / (1 << 20), variants=FOUR)  # 100 blocks


def test_figures_of_a_cell():
    timings = [Timing(0.1, ms, 50) for ms in (30.0, 10.0, 20.0)]
    made = rivals(PLAN)
    figures = made.figures("sparsemm-64", 640, 2, timings)
    token, layout = made.subject.token_bytes, made.subject.layout(64, "sparsemm")
    assert (figures["fastest_ms"], figures["step_ms"], figures["slowest_ms"]) == (10, 20, 30)
    assert figures["kept_tokens"] == pytest.approx(layout.mean_kept(640), abs=0.05)
    assert figures["ideal_kv_bytes"] == pytest.approx(2 * (layout.mean_kept(640) + 4) * token)
    floor = (made.subject.weight_bytes + figures["ideal_kv_bytes"]) / 1e9
    assert figures["floor_ms"] == pytest.approx(1e3 * floor, rel=1e-3)
    assert figures["kv_bytes"] == 50 * 16 * token
    assert made.figures("dense", 640, 2, timings)["kept_tokens"] == 640


def test_a_cache_of_fp8_has_a_byte_a_number():
    """The floor is that of the weights, as they are, and of a quarter of float32's cache."""
    made, timings = rivals(PLAN), [Timing(0.1, 20.0, 50)]
    for name in ("dense", "sparsemm"):
        suffix = "-64" if name == "sparsemm" else ""
        whole = made.figures(f"{name}{suffix}", 640, 2, timings)
        fp8 = made.figures(f"{name}-fp8{suffix}", 640, 2, timings)
        assert fp8["kv_bytes"] * 4 == whole["kv_bytes"]
        assert fp8["ideal_kv_bytes"] == pytest.approx(whole["ideal_kv_bytes"] / 4, abs=1)
        assert fp8["kept_tokens"] == whole["kept_tokens"]
        floor = (made.subject.weight_bytes + fp8["ideal_kv_bytes"]) / 1e9
        assert fp8["floor_ms"] == pytest.approx(1e3 * floor, rel=1e-3)


def test_a_cell_that_a_dense_cache_cannot_hold():
    """101 blocks of 16 tokens, and 100 in the pool; with fp8, 403."""
    n, block = 16 * 101 - 8, 16 * reader().token_bytes
    cell = rivals(PLAN, *FOUR).measure(n, 1)
    assert list(cell) == ["dense", "dense-fp8", "sparsemm-64", "sparsemm-fp8-64"]
    assert cell["dense"] == {"lacks_bytes": block}
    assert cell["dense-fp8"]["step_ms"] == 20
    assert rivals(PLAN, "sparsemm").measure(n, 1).keys() == {"sparsemm-64"}
    assert rivals(PLAN, "sparsemm").measure(n, 4) == {"skipped": NO_DENSE}
    assert rivals(PLAN, *FOUR).measure(n, 4) == {
        "dense": {"lacks_bytes": 304 * block},
        "dense-fp8": {"lacks_bytes": block // 4},
    }
    alone = Plan(budgets=(64,), tokens=8, variants=("snapkv",))
    assert rivals(alone, "snapkv").measure(n, 4).keys() == {"snapkv-64"}


def test_groups_are_measured_in_pieces(tmp_path, monkeypatch):
    opened: list[str] = []

    class Fake:
        def __init__(self, subject: Any, group: Any, *rest: Any) -> None:
            self.names = [variant.name for variant in group]
            opened.append("+".join(self.names))

        def measure(self, n: int, batch: int) -> dict[str, Any]:
            return {name: {} for name in self.names}

        def close(self) -> None:
            opened.append("closed")

    monkeypatch.setattr(decode_latency, "Rivals", Fake)
    monkeypatch.setattr(decode_latency, "copy_bandwidth", lambda: 1e9)
    plan = Plan(lengths=(1, 2), batches=(3,), dense_gib=40, pruned_gib=40, variants=FOUR)
    results = Results(tmp_path / "r.json", ASKED, cpu=True)
    results.save("n=1 batch=3 dense+dense-fp8", {"dense": {}})

    def measure(seconds: float) -> bool:
        deadline = Deadline(seconds)
        return decode_latency.measure(subject(VICUNA), plan, results, deadline, {}, H200)

    assert not measure(-1)
    assert opened == []
    assert measure(60)
    assert opened == ["dense+dense-fp8", "closed", "sparsemm+sparsemm-fp8", "closed"]
    assert len(results.cells) == 4
    assert measure(-1), "all is there"


def test_a_variant_that_the_device_does_not_serve(monkeypatch, capsys):
    """Such a device: one whose FlashAttention reads no fp8."""
    monkeypatch.setattr("speed.variants._refusals", lambda *_: {"CPU_ATTN": "no fp8"})
    assert served_here(FOUR, 64, "float32") == (
        ["dense", "sparsemm", "sparsemm-fp8"],
        {"dense-fp8": "no fp8"},
    )
    assert capsys.readouterr().out == "dense-fp8 is left out: no fp8\n"


def test_vllm_is_asked_whether_it_serves_a_cache():
    assert served_here(FOUR, 64, "float32") == (list(FOUR), {})
    _, skipped = served_here(FOUR, 64, "float64")
    assert skipped.keys() == {"dense-fp8", "sparsemm-fp8"}
    assert all("dtype not supported" in reason for reason in skipped.values())


@pytest.mark.parametrize("command", [decode_latency, prefill_cost])
def test_unknown_variants(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--variants", "dense,int4"])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert "unknown: int4; known: dense, dense-fp8, sparsemm, sparsemm-fp8" in (
        capsys.readouterr().err
    )


def test_ratios_to_both_dense_variants():
    figures = {"dense": {"ms": 20.0}, "dense-fp8": {"ms": 12.0}, "sparsemm-64": {"ms": 10.0}}
    assert ratios(figures, "sparsemm-64", "ms") == [2.0, 1.2]
    del figures["dense-fp8"]
    assert ratios(figures, "sparsemm-64", "ms") == [2.0, None]


def test_tables(tmp_path):
    results = Results(tmp_path / "r.json", ASKED, cpu=True)
    results.save("n=640 batch=2 dense+sparsemm", rivals(PLAN, "dense", "sparsemm").measure(640, 2))
    results.save("n=640 batch=2 dense-fp8", rivals(PLAN, "dense-fp8").measure(640, 2))
    results.save("n=32768 batch=32 dense", {"dense": {"lacks_bytes": 444 << 20}})
    results.save("n=32768 batch=32 snapkv", {"skipped": NO_DENSE})
    lines = decode_latency.table(results).splitlines()
    assert lines[2].split()[:6] == ["640", "2", "sparsemm-64", "20.000", "1.00", "1.00"]
    assert lines[4].split()[:3] == ["32768", "32", "dense"]
    assert lines[4].endswith("KV cache needs 444.0 MiB more")
    assert len(lines) == 5
    shares = Results(tmp_path / "p.json", ASKED, cpu=True)
    shares.save("n=640 dense", {"first_token_s": 0.2})
    shares.save("n=640 dense-fp8", {"first_token_s": 0.25})
    shares.save("n=640 sparsemm", {"first_token_s": 0.21, "prune_share": 0.05})
    lines = prefill_cost.table(shares).splitlines()
    assert lines[1].split() == ["640", "dense", "0.2000", "1.00", "1.25"]
    assert lines[3].split() == ["640", "sparsemm", "0.2100", "0.95", "1.19", "5.0%"]


def test_the_prune_is_the_difference_of_neighbours():
    """A machine that slows down does not look like a prune."""
    times = iter([9.0, 9.0, 1.0, 1.1, 2.0, 2.1, 3.0, 3.1])  # the first pair warms up
    engine: Any = SimpleNamespace(ask=lambda *_: Timing(next(times), 0.0, 0))
    cell = prefill_cost.measure(engine, VARIANTS["sparsemm"], 200, 10, rounds=3)
    assert cell["prune_share"] == pytest.approx(0.1 / 2)
    assert (cell["whole_s"], cell["first_token_s"]) == (2.0, 2.1)
    times = iter([9.0, 1.0, 2.0, 3.0])
    cell = prefill_cost.measure(engine, VARIANTS["dense-fp8"], 200, 10, rounds=3)
    assert cell == {"first_token_s": 2.0, "fastest_s": 1.0, "slowest_s": 3.0}


def test_prompts_differ():
    prompts = random_prompts(50, 4, 500, seed=1) + random_prompts(50, 4, 500, seed=2)
    assert len({tuple(prompt) for prompt in prompts}) == 100
    assert all(0 <= token < 490 for prompt in prompts for token in prompt)


# What is shown


def test_the_readmes_tables_are_the_results():
    text = (Path(report.ROOT) / "README.md").read_text()
    assert report.with_tables(text, report.TABLES) == text, "run benchmarks/report.py readme"
    with pytest.raises(ValueError, match="markers of the table gpu are missing"):
        report.with_tables("# A README\n", report.TABLES)


def test_decode_curves(tmp_path):
    results = Results(tmp_path / "r.json", ASKED, cpu=True)
    names = tuple(VARIANTS)
    cell = rivals(Plan(budgets=(64,), tokens=8), *names).measure(160, 2)
    results.save("n=160 batch=2 all", cell)
    results.save("n=160 batch=2 dense", {"dense": cell["dense"] | {"step_ms": 99.0}})
    results.save("n=1280 batch=2 dense", {"dense": {"lacks_bytes": 1}})
    points = report.decode_points(results.data)
    assert points.keys() == {2}
    assert list(points[2]) == ["dense", "dense-fp8", "sparsemm-64", "sparsemm-fp8-64", "snapkv-64"]
    assert [step for _, step, _ in points[2]["dense"]] == [20.0], "dense is drawn once"
    report.draw_decode(results.data, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_the_bandwidth_is_measured() -> None:
    """Bytes a second, of some machine: at least those of a slow disk."""
    assert 1e8 < copy_bandwidth(repeats=2) < 1e14
