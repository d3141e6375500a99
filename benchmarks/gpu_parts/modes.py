"""A model of four layers: the same tokens without CUDA graphs and in every graph mode."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_parts.bench import Model, head_scores
from gpu_parts.device import Context

NEEDS = 90
VOCABULARY = 32000

# Options of `LLM` by name. Full graphs come without Inductor too, so that they are checked even
# where it fails.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "piecewise": {"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE"}},
    "both": {"compilation_config": {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}},
}
GRAPHS = {
    "eager": "NONE",
    "full": "FULL_DECODE_ONLY",
    "piecewise": "PIECEWISE",
    "both": "FULL_AND_PIECEWISE",
}

# Difference of log-probabilities, and gap between the best two tokens that may be swapped.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def write_model(folder: Path, model: Model, hidden: int, intermediate: int, length: int) -> Path:
    """A Llama's configuration; its weights are made up, and it needs no tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": model.L,
        "num_attention_heads": model.Hq,
        "num_key_value_heads": model.Hkv,
        "head_dim": model.D,
        "vocab_size": VOCABULARY if hidden > 256 else 128,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prompts(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def settings(context: Context, model: Model, budget: int, window: int) -> dict[str, Any]:
    """SPARSEMM's, with concentrated head scores."""
    profile = {
        "model_id": model.name,
        "num_layers": model.L,
        "num_query_heads": model.Hq,
        "num_kv_heads": model.Hkv,
        "scores": head_scores(model, context.scores).tolist(),
    }
    return {"budget": budget, "window": window, "profile": profile}


def run_engine(context: Context, name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Start an engine in a process of its own and let it answer."""
    folder = context.folder / "engines"
    folder.mkdir(exist_ok=True)
    job_path, result, log = (folder / f"{name}.{kind}" for kind in ("job", "result", "log"))
    job_path.write_text(json.dumps(job | {"dry": context.device.dry}))
    result.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "gpu_parts.engine", str(job_path), str(result)]
    here = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), here)))
    with log.open("w") as output:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, context.left),
        )
    if done.returncode:
        raise RuntimeError(f"the engine failed:\n{log.read_text()[-6000:]}")
    return json.loads(result.read_text())


def compare(
    mine: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float
) -> dict[str, Any]:
    """Equal tokens up to where the expected best two are nearly alike, and log-probabilities.

    Raises:
        AssertionError: saying which request and token differ.
    """
    differences, wrong, swaps = [], [], 0
    for request, (a, b) in enumerate(zip(mine, expected, strict=True)):
        for i, (token, other) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            if token != other:  # what follows answers another text
                gap = b["gaps"][i]
                swaps += 1
                if gap >= tolerance:
                    wrong.append(f"request {request}, token {i}: another, at a gap of {gap:.4f}")
                break
            differences.append(abs(a["logprobs"][i] - b["logprobs"][i]))
            if differences[-1] > tolerance:
                wrong.append(f"request {request}, token {i}: differs by {differences[-1]:.4f}")
    total = sum(len(b["tokens"]) for b in expected)
    if len(differences) < total // 8:
        wrong.append("too few tokens could be compared")
    found = {"compared": len(differences), "of": total, "swaps": swaps}
    found["largest_difference"] = max(differences, default=0.0)
    assert not wrong, f"{found}: {'; '.join(wrong[:10])}"
    return found


def serve(context: Context, mode: str, dtype: str) -> dict[str, Any]:
    """Requests of unequal lengths, of which some are pruned while others replay graphs."""
    dry = context.device.dry
    if dry:
        model, hidden = Model("tiny", 4, 8, 4, 32, 0), 256
        lengths, tokens, budget, window = (60, 20, 75, 33), 6, 40, 8
    else:
        model, hidden = Model("small", 4, 8, 4, 128, 0), 1024
        lengths, tokens, budget, window = (700, 90, 1533, 40, 512, 257, 1024), 32, 128, 32
    folder = write_model(context.folder / "engines" / "small", model, hidden, 4 * hidden, 4096)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    options = {
        "model": str(folder),
        "dtype": dtype,
        "attention_backend": "SPARSEMM",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": (64 << 20) if dry else (2 << 30),
    }
    options |= MODES["eager"] if dry else MODES[mode]
    if mode != "eager" and not dry:
        options["compilation_config"] |= {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    job = {
        "options": options,
        "settings": settings(context, model, budget, window),
        "rounds": [{"prompts": prompts(lengths, vocabulary), "every": 3, "tokens": tokens}],
    }
    result = run_engine(context, f"modes-{dtype}-{mode}", job)
    (own,) = result["rounds"]
    assert result["backend"] == ["SPARSEMM"], f"vLLM chose {result['backend']}"
    assert dry or result["graphs"] == GRAPHS[mode], f"vLLM chose {result['graphs']}"
    assert own["idle"], "blocks are held by nobody"
    assert 0 < own["pruned"] < len(lengths), f"{own['pruned']} prompts are pruned"
    if mode != "eager":
        expected = context.results.get(f"{dtype} eager")
        assert expected is not None, "there is nothing to compare with: eager failed"
        (other,) = expected["rounds"]
        result |= compare(own["answers"], other["answers"], TOLERANCE[dtype])
    return result


def cases(context: Context) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every mode, the one to compare with first."""
    dry = context.device.dry
    dtypes = ("float32",) if dry else ("bfloat16", "float32")
    modes = ("eager", "full") if dry else MODES
    return {
        f"{dtype} {mode}": partial(serve, context, mode, dtype)
        for dtype in dtypes
        for mode in modes
    }


def summary(results: dict[str, Any]) -> list[str]:
    """A line for each mode."""
    lines = []
    for name, r in results.items():
        line = f"{name:20} started in {r['start_seconds']:.0f} s, graphs {r['graphs']}"
        if "compared" in r:
            line += f", {r['compared']} of {r['of']} tokens compared, {r['swaps']} swaps of nearly"
            line += f" equal ones, log-probabilities within {r['largest_difference']:.1e}"
        lines.append(line)
    return lines
