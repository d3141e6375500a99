"""A model of four layers: the same tokens without CUDA graphs and in every graph mode."""

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import HERE, with_paths
from timed_cases import Model, W, head_scores
from transformers import LlamaConfig

from gpu_parts.device import Cases, Context
from sparsemm_vllm.files import write_json

NEEDS = 40
# What torch and vLLM say under VLLM_GPU_SYNC_CHECK=warn, and where.
SYNC_WARNING = re.compile(
    r"^(\S+:\d+): UserWarning: .*(?:called a synchronizing CUDA operation|may be silently sync)",
    re.MULTILINE,
)
VOCABULARY = 32000
SMALL = Model("small", 4, 8, 4, 128, 0)
BUDGET, LENGTH, REQUESTS = 128, 2048, 8

# Options of `LLM` by name. Full graphs come without Inductor too, so that they are checked even
# where it fails.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "piecewise": {"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE"}},
    "both": {"compilation_config": {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}},
}
GRAPHS = {
    mode: options.get("compilation_config", {}).get("cudagraph_mode", "NONE")
    for mode, options in MODES.items()
}


@dataclass(frozen=True)
class Gate:
    """Differences of log-probabilities that rounding explains; larger ones are a bug.

    Two engines round differently: Inductor fuses norms, FlashAttention and our kernel add in other
    orders. Over the layers most differences are a fraction of a rounding step of the logits and a
    few are several. So each gate is on what it holds for: half of the tokens, 99 of 100, all. Wrong
    keys or values change every token that a request generates after them, at random: more than one
    of 100 tokens even for a single request, and by more than the largest rounding error.

    Attributes:
        median: largest median of all compared tokens.
        most: largest difference of 99 of 100 tokens.
        largest: largest difference of any token.
    """

    median: float
    most: float
    largest: float


# Logits are below 8. bfloat16 rounds those of 4 to 8 to multiples of 1/32: two such steps are
# `most`, and a quarter of one the median. float32: the same, less its 2**-16 and with room for
# products that add up in another order.
GATES = {"float32": Gate(1e-4, 1e-3, 1e-2), "bfloat16": Gate(8e-3, 6.25e-2, 0.5)}


def write_model(folder: Path, model: Model, hidden: int, intermediate: int, length: int) -> Path:
    """A Llama's configuration; its weights are made up, and it needs no tokenizer."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=model.L,
        num_attention_heads=model.Hq,
        num_key_value_heads=model.Hkv,
        head_dim=model.D,
        vocab_size=VOCABULARY if hidden > 256 else 128,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
    )
    config.save_pretrained(folder)
    return folder


def prompts(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def settings(model: Model, budget: int, window: int) -> dict[str, Any]:
    """SPARSEMM's, with concentrated head scores."""
    profile = {
        "model_id": model.name,
        "num_layers": model.L,
        "num_query_heads": model.Hq,
        "num_kv_heads": model.Hkv,
        "scores": head_scores(model).tolist(),
    }
    return {"budget": budget, "window": window, "profile": profile}


def run_engine(
    context: Context, name: str, job: dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Start an engine in a process of its own and let it answer.

    Args:
        context: context of the part.
        name: name of its files, in ``engines/``.
        job: document that `gpu_parts.engine` is told.
        environment: variables for it, beside those of this process.

    Returns:
        The engine's result, and its `sync_warnings` if vLLM's check for waits was on.
    """
    folder = context.folder / "engines"
    folder.mkdir(exist_ok=True)
    job_path, result, log = (folder / f"{name}.{kind}" for kind in ("job", "result", "log"))
    write_json(job_path, job | {"dry": context.device.dry})
    result.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "gpu_parts.engine", str(job_path), str(result)]
    with log.open("w") as output:
        done = subprocess.run(
            command,
            env=with_paths(HERE, **(environment or {})),
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, context.left),
        )
    said = log.read_text()
    if done.returncode:
        raise RuntimeError(f"the engine failed:\n{said[-6000:]}")
    answered = json.loads(result.read_text())
    if "VLLM_GPU_SYNC_CHECK" in (environment or {}):
        answered["sync_warnings"] = sync_warnings(said)
    return answered


def sync_warnings(log: str) -> dict[str, int]:
    """How often an engine waited for the GPU where it should not, by file and line."""
    return dict(Counter(SYNC_WARNING.findall(log)))


def compare(
    mine: list[dict[str, Any]], expected: list[dict[str, Any]], gate: Gate
) -> dict[str, Any]:
    """Compare log-probabilities, request by request up to the first token that is another.

    There the best two of the expected ones count as one difference, as large as the gap between
    them: less would not swap them.

    Returns:
        How many tokens were ``compared``, ``of`` how many, and the distribution of the differences.

    Raises:
        AssertionError: if differences are not of rounding, or too few tokens can be compared.
    """
    differences, where, swaps = [], [], 0
    for request, (a, b) in enumerate(zip(mine, expected, strict=True)):
        for i, (token, other) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            swapped = token != other
            own = b["gaps"][i] if swapped else abs(a["logprobs"][i] - b["logprobs"][i])
            differences.append(own)
            where.append(f"request {request}, token {i}")
            if swapped:  # what follows answers another text
                swaps += 1
                break
    total = sum(len(b["tokens"]) for b in expected)
    found = distribution(differences)
    result = {"compared": len(differences), "of": total, "swaps": swaps, "differences": found}
    assert len(differences) >= total // 8, f"too few tokens could be compared: {result}"
    allowed = {"median": gate.median, "q99": gate.most, "largest": gate.largest}
    wrong = [
        f"{name} {found[name]:.1e}, at most {most:.1e}"
        for name, most in allowed.items()
        if not found[name] <= most  # NaN is wrong too
    ]
    worst = where[differences.index(found["largest"])] if wrong else None
    assert not wrong, f"differences: {'; '.join(wrong)}, at {worst}; {result}"
    return result


def distribution(differences: list[float]) -> dict[str, float]:
    """Quantiles, each a difference that occurs: as many per cent are at most as large."""
    ordered = sorted(differences)
    found = {"count": float(len(ordered))}
    for name, share in (("median", 0.5), ("q90", 0.9), ("q99", 0.99), ("largest", 1.0)):
        found[name] = ordered[math.ceil(share * len(ordered)) - 1]
    return found


def serve(context: Context, mode: str, dtype: str) -> dict[str, Any]:
    """Requests of unequal lengths, of which some are pruned while others replay graphs."""
    dry = context.device.dry
    if dry:
        model, hidden = Model("tiny", 4, 8, 4, 32, 0), 256
        lengths, tokens, budget, window = (60, 20, 75, 33), 6, 40, 8
    else:
        model, hidden = SMALL, 1024
        lengths, tokens, budget, window = (700, 90, 1533, 40, 512, 257, 1024), 32, BUDGET, W
    folder = write_model(context.folder / "engines" / "small", model, hidden, 4 * hidden, 4096)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    options = {
        "model": str(folder),
        "dtype": dtype,
        "attention_backend": "SPARSEMM",
        "max_model_len": LENGTH,
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": LENGTH,
        "kv_cache_memory_bytes": (64 << 20) if dry else (2 << 30),
        "gpu_memory_utilization": 0.1,  # vLLM wants that much to be free; others run beside it
    }
    options |= MODES["eager"] if dry else MODES[mode]
    if mode != "eager" and not dry:
        options["compilation_config"] |= {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    job = {
        "options": options,
        "settings": settings(model, budget, window),
        "rounds": [{"prompts": prompts(lengths, vocabulary), "every": 3, "tokens": tokens}],
    }
    check = {"VLLM_GPU_SYNC_CHECK": "warn"} if mode == "full" else {}
    result = run_engine(context, f"modes-{dtype}-{mode}", job, check)
    (own,) = result["rounds"]
    assert result["backend"] == ["SPARSEMM"], f"vLLM chose {result['backend']}"
    assert dry or result["graphs"] == GRAPHS[mode], f"vLLM chose {result['graphs']}"
    assert own["idle"], "blocks are held by nobody"
    assert 0 < own["pruned"] < len(lengths), f"{own['pruned']} prompts are pruned"
    if mode != "eager":
        (other,) = context.wait(f"{dtype} eager")["rounds"]
        result |= compare(own["answers"], other["answers"], GATES[dtype])
    return result


def cases(context: Context) -> Cases:
    """Every mode, the one to compare with first."""
    dry = context.device.dry
    dtypes = ("float32",) if dry else ("bfloat16", "float32")
    modes = ("eager", "full") if dry else MODES
    return {
        f"{dtype} {mode}": partial(serve, context, mode, dtype)
        for dtype in dtypes
        for mode in modes
    }
