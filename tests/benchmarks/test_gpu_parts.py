"""What the parts of the GPU suite compute and decide, in this process."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from gpu_parts import bench, kernels, modes, ncu
from gpu_parts.bench import STEPS
from gpu_parts.device import Context, Device
from gpu_report import summary


def answers(seed: int, requests: int = 7, tokens: int = 32) -> list[dict]:
    """Made-up answers, with log-probabilities as a model of random weights has them."""
    draw = random.Random(seed)
    return [
        {
            "tokens": [draw.randrange(32000) for _ in range(tokens)],
            "logprobs": [draw.uniform(-9, -1) for _ in range(tokens)],
            "gaps": [draw.expovariate(3) for _ in range(tokens)],
        }
        for _ in range(requests)
    ]


def with_noise(given: list[dict], size: float, requests: slice = slice(None)) -> list[dict]:
    """The same with log-probabilities that differ, normally distributed."""
    draw = random.Random(1)
    mine = json.loads(json.dumps(given))
    for answer in mine[requests]:
        answer["logprobs"] = [x + draw.gauss(0, size) for x in answer["logprobs"]]
    return mine


def test_rounding_passes_the_gate() -> None:
    """As bfloat16 rounds; one token may be off by more than 99 of 100 are."""
    expected = answers(0)
    mine = with_noise(expected, 0.01)
    mine[3]["logprobs"][5] += 0.2
    mine[2]["tokens"][20] += 1  # a swap of two that are nearly alike
    expected[2]["gaps"][20] = 0.01
    found = modes.compare(mine, expected, modes.GATES["bfloat16"])
    assert (found["compared"], found["of"], found["swaps"]) == (7 * 32 - 11, 7 * 32, 1)
    differences = found["differences"]
    assert differences["count"] == found["compared"]
    assert 0.004 < differences["median"] < 0.009
    assert differences["q99"] < 0.05 < 0.15 < differences["largest"] < 0.25


@pytest.mark.parametrize(
    ("size", "requests", "gate"),
    [
        (0.3, slice(4, 5), "q99"),  # one request reads wrong keys
        (0.03, slice(None), "median"),  # all are a little off
        (2.0, slice(None), "largest"),
    ],
)
def test_a_bug_does_not_pass_the_gate(size: float, requests: slice, gate: str) -> None:
    expected = answers(0)
    with pytest.raises(AssertionError, match=f"differences: .*{gate} "):
        modes.compare(with_noise(expected, size, requests), expected, modes.GATES["bfloat16"])


def test_one_token_far_off_does_not_pass_the_gate() -> None:
    expected = answers(0)
    mine = with_noise(expected, 0.01)
    mine[6]["logprobs"][31] += 1.5
    with pytest.raises(AssertionError, match=r"largest .* at request 6, token 31"):
        modes.compare(mine, expected, modes.GATES["bfloat16"])
    mine[6]["logprobs"][31] = float("nan")
    with pytest.raises(AssertionError, match="differences"):
        modes.compare(mine, expected, modes.GATES["bfloat16"])


def test_other_tokens_do_not_pass_the_gate() -> None:
    """A wide gap is a difference; and answers that part at once prove nothing."""
    expected = answers(0)
    mine = with_noise(expected, 0.001)
    mine[1]["tokens"][30] += 1
    expected[1]["gaps"][30] = 1.0
    with pytest.raises(AssertionError, match=r"largest 1\.0e"):
        modes.compare(mine, expected, modes.GATES["bfloat16"])
    for own, other in zip(mine, expected, strict=True):
        own["tokens"][1] += 1
        other["gaps"][1] = 0.001
    with pytest.raises(AssertionError, match="too few tokens"):
        modes.compare(mine, expected, modes.GATES["bfloat16"])


def test_what_serving_uses_comes_first() -> None:
    device = Device.__new__(Device)
    device.dry = False
    names = list(kernels.cases(Context(device, Path(), 0)))
    assert names[0] == "smoke dtype=bf16 D=128 P=16 G=1 Q=1 layout=LBHNC"
    smoke = [name for name in names if name.startswith("smoke")]
    assert names[:10] == smoke
    assert sum("graph" in name for name in smoke) == 2
    assert sum("layout=LBNHC" in name for name in smoke) == 4
    dtypes = [name.split()[0] for name in names[10:] if name.startswith("dtype")]
    order = [f"dtype={dtype}" for dtype in ("bf16", "fp8", "fp16", "fp32")]
    assert dtypes == sorted(dtypes, key=order.index)
    assert len(set(dtypes)) == 4
    assert STEPS[0].name == "decode vicuna-7b B=256 batch=8"
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_the_model_predicts_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the costs of this very kernel, at the bandwidth that was measured; else nothing."""
    model = bench.Model("wide", 2, 4, 2, 128, 1e6)
    step = bench.Step(model, 2, 64, n=200)
    device = Device(dry=True)
    setup = bench.Predicted(device, step, torch.bfloat16)
    assert setup.model_us(1e12) is None, "nobody has compiled it for two heads of a KV head"
    costs = bench.Costs(bench.DecodeParts(*[bench.Part(10, 100)] * 6), 128, 4, 2)
    known = {bench.triton.__version__: {"bf16 G=2": costs, "fp8 G=2": costs}}
    monkeypatch.setattr(bench, "read_costs", lambda: known)
    monkeypatch.setattr(bench, "COSTS", Path(__file__))
    floor = 1e6 * setup.bytes / 1e6
    assert setup.model_us(1e6) == pytest.approx(floor, rel=0.01), "a slow memory decides"
    assert setup.model_us(1e15) < 0.1 * floor
    other = dataclasses.replace(costs, block_n=64)
    known[bench.triton.__version__]["bf16 G=2"] = other
    assert setup.model_us(1e6) is None, "another tile"


def test_waits_for_the_gpu_are_counted() -> None:
    """As torch and vLLM word them, in an engine's log."""
    log = """INFO serving
/site/sparsemm_vllm/step.py:182: UserWarning: called a synchronizing CUDA operation (Triggered ...)
  self.pages.prompt_tokens[index] = n
/site/sparsemm_vllm/step.py:182: UserWarning: called a synchronizing CUDA operation (Triggered ...)
/site/a.py:9: UserWarning: Tensor.to: a non_blocking H2D copy that may be silently synchronous (x)
/site/b.py:7: UserWarning: something else
"""
    found = modes.sync_warnings(log)
    assert found == {"/site/sparsemm_vllm/step.py:182": 2, "/site/a.py:9": 1}


def test_counters_of_ncu() -> None:
    lines = [
        "==PROF== Connected to process 7",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
        '"0","_sparse_decode","GPU Speed Of Light Throughput","Duration","us","12.5"',
        '"0","_sparse_decode","GPU Speed Of Light Throughput","DRAM Throughput","%","61.2"',
        '"0","_sparse_decode","Memory Workload Analysis","","",""',
    ]
    counters = ncu.read_counters(lines)
    assert counters == {"Duration": "12.5 us", "DRAM Throughput": "61.2 %"}
    lines = summary.sections({"ncu": {"cases": {"decode": {"counters": counters}}}})
    assert {"| Duration | 12.5 us |", "| DRAM Throughput | 61.2 % |"} <= set(lines)
