"""`sparsemm plan`: bytes and blocks as the scheduler counts them, and what fits."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner
from vllm.v1.kv_cache_interface import FullAttentionSpec

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.methods import METHODS
from sparsemm_vllm.budget.plan import DTYPE_BYTES, PlanError, make_plan, readable_bytes
from sparsemm_vllm.budget.profile import HeadProfile, save_profile
from sparsemm_vllm.budget.settings import Settings, SettingsError
from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.plan import print_plan
from support import tiny

BUDGET_100 = Settings(budget=100)


@pytest.fixture
def profile():
    return tiny.skewed_profile()


@pytest.fixture
def file(tmp_path, profile):
    save_profile(profile, tmp_path / "profile.json")
    return tmp_path / "profile.json"


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def expected_kept(profile, budget, window, rho, n):
    """From the paper's formula: tokens per KV head, window included."""
    scores = np.array(profile.scores)
    share = scores.reshape(len(scores), profile.num_kv_heads, -1).sum(-1) / scores.sum()
    base = budget - window
    floor = int(rho * base)
    capacity = np.rint(share * (base - floor) * share.size + floor)
    return np.minimum(capacity, n - window).astype(int) + window if n >= budget else share * 0 + n


# Budget less than, equal to and larger than the prompt; block sizes that do and do not divide it.
@pytest.mark.parametrize("n", [99, 100, 101, 1600, 1601])
@pytest.mark.parametrize("block_size", [7, 16, 64])
def test_bytes_of_one_request(profile, n, block_size):
    plan = make_plan(
        profile, Settings(budget=100, window=8, rho=0.2), n, block_size=block_size, head_size=80
    )
    heads = profile.num_layers * profile.num_kv_heads
    kept = expected_kept(profile, 100, 8, 0.2, n)
    pages = np.ceil((kept - 8) / block_size).sum()  # the window stays in the prompt's blocks
    blocks = -(-n // block_size)
    compact = -(-int(pages) // heads) if n >= 100 else 0
    freed = (n - 8) // block_size if n >= 100 else 0
    assert plan.pruned == (n >= 100)
    assert plan.block_bytes == heads * block_size * 2 * 80 * 2
    assert plan.dense_blocks == blocks
    assert plan.peak_blocks == blocks + compact
    assert plan.pruned_blocks == blocks + compact - freed
    for part in ("dense", "peak", "pruned"):
        assert getattr(plan, f"{part}_bytes") == getattr(plan, f"{part}_blocks") * plan.block_bytes
    assert plan.ideal_bytes == kept.sum() * 2 * 80 * 2
    assert plan.dense_ideal_bytes == heads * n * 2 * 80 * 2
    assert plan.ideal_bytes <= plan.pruned_bytes
    assert (plan.kept_min, plan.kept_max) == (kept.min(), kept.max())
    assert plan.kept_median == np.median(kept)
    assert plan.kept_mean == pytest.approx(kept.mean())
    assert plan.kv_memory_bytes is plan.dense_requests is plan.pruned_requests is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "fp8"])
def test_a_block_is_as_large_as_vllm_makes_it(profile, dtype):
    torch_dtype = torch.float8_e4m3fn if dtype == "fp8" else getattr(torch, dtype)
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=profile.num_kv_heads, head_size=96, dtype=torch_dtype
    )
    plan = make_plan(profile, BUDGET_100, 500, head_size=96, dtype=dtype)
    assert plan.block_bytes == spec.page_size_bytes * profile.num_layers


def test_what_fits_is_the_most_that_does(profile):
    """One request is in the step that prunes, the others after it; vLLM keeps a block for itself.

    Memory from none to several requests, and no whole number of blocks.
    """
    some = make_plan(profile, BUDGET_100, 500, answer_tokens=33)
    seen = set()
    for blocks in np.arange(0.5, 4.5 * some.peak_blocks):
        gigabytes = float(blocks) * some.block_bytes / 1e9
        plan = make_plan(profile, BUDGET_100, 500, answer_tokens=33, kv_memory=gigabytes)
        usable = int(blocks) - 1
        most = max(plan.peak_blocks, plan.pruned_blocks)
        fitting = [m for m in range(99) if m == 0 or most + (m - 1) * plan.pruned_blocks <= usable]
        assert plan.pruned_requests == max(fitting)
        assert plan.dense_requests == max(usable, 0) // plan.dense_blocks
        seen.add((plan.dense_requests, plan.pruned_requests))
    assert (0, 0) in seen
    assert any(pruned > dense > 0 for dense, pruned in seen)


def test_the_answer_is_kept_by_every_head(profile):
    without, with_answer = (make_plan(profile, BUDGET_100, 500, answer_tokens=a) for a in (0, 160))
    assert with_answer.pruned_blocks == without.pruned_blocks + 10
    assert with_answer.dense_blocks == without.dense_blocks + 10
    assert with_answer.peak_blocks == without.peak_blocks
    heads = profile.num_layers * profile.num_kv_heads
    assert with_answer.ideal_bytes - without.ideal_bytes == heads * 160 * 2 * 128 * 2


def test_a_long_answer_needs_more_than_the_step_that_prunes(profile):
    plan = make_plan(profile, BUDGET_100, 500, answer_tokens=5000, kv_memory=0.04)
    assert plan.pruned_blocks > plan.peak_blocks
    assert plan.pruned_requests == (40_000_000 // plan.block_bytes - 1) // plan.pruned_blocks


def test_published_scores(published):
    """The figures of the README: 192 blocks dense, 17 pruned."""
    profile = HeadProfile(
        model_id="llava-next-vicuna-7b", num_layers=32, num_query_heads=32, num_kv_heads=32,
        scores=published[0].tolist(),
    )  # fmt: skip
    plan = make_plan(profile, Settings(), 3072, kv_memory=40)
    assert (plan.dense_blocks, plan.pruned_blocks) == (192, 17)
    assert plan.dense_bytes == 3072 * 512 * 1024
    assert (plan.kept_median, plan.kept_max) == (66, 3072)
    assert 1 < plan.pruned_bytes / plan.ideal_bytes < 1.1
    assert plan.dense_requests == 24
    assert plan.pruned_requests > 10 * plan.dense_requests


@given(
    st.integers(33, 2000), st.integers(1, 5000), st.integers(0, 300), st.sampled_from([1, 16, 128])
)
def test_no_plan_is_impossible(budget, n, answer, block_size):
    profile = tiny.skewed_profile()
    plan = make_plan(
        profile, Settings(budget=budget), n, answer_tokens=answer, block_size=block_size,
        kv_memory=0.1,
    )  # fmt: skip
    assert plan.ideal_bytes <= plan.pruned_bytes
    assert plan.dense_ideal_bytes <= plan.dense_bytes
    assert plan.window <= plan.kept_min <= plan.kept_max <= n or not plan.pruned
    if not plan.pruned:
        assert plan.pruned_blocks == plan.dense_blocks
        assert plan.ideal_bytes == plan.dense_ideal_bytes
        assert plan.pruned_requests == plan.dense_requests


@pytest.mark.parametrize("method", METHODS)
def test_every_method(file, profile, method):
    """Blocks are the layout's; of even heads the mean is the budget."""
    done = run(file, "--prompt-tokens", 500, "--budget", 100, "--method", method)
    assert done.exit_code == 0, done.output
    plan = make_plan(profile, Settings(budget=100, method=method), 500)
    layout = CacheLayout.from_scores(profile.tensor(), profile.num_kv_heads, 100, method=method)
    assert plan.pruned_blocks == layout.held_blocks(500, 500, 16)
    assert f"; {method}, budget 100" in done.stdout.replace("\n", " ")
    assert plan.pruned == (method != "full")
    assert ("Method full: nothing is pruned" in done.stdout) == (method == "full")
    if method in ("snapkv", "adakv", "random"):
        mean = 99 if method == "adakv" else 100  # its published rounding loses one of 68
        assert plan.kept_min == plan.kept_mean == plan.kept_max == mean


def test_redistribution_uses_the_budget_up(file, profile):
    plain, given = (
        make_plan(profile, Settings(budget=100, redistribute=r), 300) for r in (False, True)
    )
    assert plain.kept_mean < 99.5 < given.kept_mean < 100.5
    assert given.kept_max == plain.kept_max == 300
    assert "redistributed" in printed(given)
    assert "redistributed" not in printed(plain)


def test_json_has_all_numbers(file, profile):
    arguments = ("--prompt-tokens", 500, "--budget", 100, "--kv-memory", 0.5, "--dtype", "fp8")
    sizes = ("--block-size", 32, "--head-size", 64, "--window", 16, "--rho", 0.3)
    done = run(file, *arguments, *sizes, "--answer-tokens", 9, "--json")
    assert done.exit_code == 0, done.output
    plan = make_plan(
        profile, Settings(budget=100, window=16, rho=0.3), 500, answer_tokens=9, kv_memory=0.5,
        block_size=32, head_size=64, dtype="fp8",
    )  # fmt: skip
    assert json.loads(done.stdout) == asdict(plan)


def test_the_table_has_the_numbers(file, profile):
    done = run(file, "--prompt-tokens", 3000, "--budget", 100, "--kv-memory", 1)
    assert done.exit_code == 0, done.output
    plan = make_plan(profile, BUDGET_100, 3000, kv_memory=1)
    lines = {line.strip()[:12]: line for line in done.stdout.splitlines()}
    for name, values in {
        "blocks of 16": (plan.dense_blocks, plan.pruned_blocks),
        "KV memory": map(readable_bytes, (plan.dense_bytes, plan.pruned_bytes)),
        "ideal: not r": map(readable_bytes, (plan.dense_ideal_bytes, plan.ideal_bytes)),
        "in the step ": (readable_bytes(plan.peak_bytes),),
        "requests at ": (plan.dense_requests, plan.pruned_requests),
        "smallest, me": (plan.kept_min, f"{plan.kept_median:g}", plan.kept_max),
    }.items():
        line = next(line for start, line in lines.items() if start.startswith(name))
        for value in values:
            assert f" {value:,}" if isinstance(value, int) else value in line
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert plan.model_id in done.stdout
    assert "(assumed: --head-size)" in done.stdout.replace("\n", " ")
    assert "assumed" not in run(file, "--prompt-tokens", 3000, "--head-size", 128).stdout


def test_a_bundled_profile_by_name():
    assert run("sparsemm-reader", "--prompt-tokens", 214, "--budget", 64).exit_code == 0


def printed(plan):
    console = Console(file=io.StringIO(), width=80)
    print_plan(plan, console)
    return console.file.getvalue()


def test_a_budget_that_covers_the_prompt_says_so(profile):
    note = "nothing is pruned"
    assert note in printed(make_plan(profile, Settings(), 100))
    assert note not in printed(make_plan(profile, Settings(), 1000))


def test_a_cache_that_is_too_small_says_so(profile):
    assert "too small" in printed(make_plan(profile, BUDGET_100, 3000, kv_memory=1e-6))
    assert "too small" not in printed(make_plan(profile, BUDGET_100, 3000, kv_memory=1))
    assert "too small" not in printed(make_plan(profile, BUDGET_100, 3000))


def test_a_name_is_not_markup_and_no_control_code(profile):
    odd = profile.model_copy(update={"model_id": "[red]a\x1b[2J\nb"})
    assert "[red]a?[2J?b" in printed(make_plan(odd, BUDGET_100, 500))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"),
     (99_960, "100 kB"), (1_610_612_736, "1.61 GB"), (4e10, "40 GB"), (2.5e12, "2.5 TB")],
)  # fmt: skip
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens is 0"),
        ({"prompt_tokens": 2**31}, "less than 2^31"),
        ({"block_size": 0}, "--block-size is 0"),
        ({"head_size": -1}, "--head-size is -1"),
        ({"answer_tokens": -1}, "--answer-tokens is -1"),
        ({"kv_memory": 0.0}, "--kv-memory is 0 GB"),
        ({"kv_memory": float("nan")}, "--kv-memory is nan GB"),
        ({"kv_memory": float("inf")}, "--kv-memory is inf GB"),
        ({"dtype": "int8"}, "'int8'; known are " + ", ".join(DTYPE_BYTES)),
        ({"budget": 32}, "budget (32 tokens) must be larger than window (32 tokens)"),
        ({"budget": 2**31}, "budget"),
        ({"window": 0}, "window"),
        ({"window": 65}, "window"),
        ({"rho": 1.5}, "rho"),
        ({"method": "snapvk"}, "unknown method 'snapvk'; did you mean 'snapkv'?"),
        ({"rho": float("nan")}, "rho"),
    ],
)
def test_plans_that_are_refused(file, profile, change, message):
    asked = {"budget": 100, "prompt_tokens": 500} | change
    values = {name: value for name, value in asked.items() if name in Settings.model_fields}
    sizes = {name: value for name, value in asked.items() if name not in values}
    with pytest.raises((PlanError, SettingsError)) as error:
        make_plan(profile, Settings.from_values(values), **sizes)
    assert message in str(error.value)
    options = [part for k, v in asked.items() for part in (f"--{k.replace('_', '-')}", v)]
    done = run(file, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"sparsemm plan: {error.value}\n"


def test_a_profile_that_does_not_exist():
    done = run("sparsemm-raeder", "--prompt-tokens", 500)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "did you mean 'sparsemm-reader'?" in line
