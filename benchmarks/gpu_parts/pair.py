"""A 7B model in full size with random weights: dense and SPARSEMM, one after the other."""

from functools import partial
from typing import Any

from decode_model import VICUNA
from timed_cases import TINY, Model, W

from gpu_parts import modes
from gpu_parts.device import Cases, Context

NEEDS = 40
LONG, TOKENS = 8192, 128  # of a prompt and its answer, where speed is measured
LENGTH = LONG + TOKENS + 64
KEEPS_ALL = 1024  # a budget that the short prompts do not exceed
BUDGET = 256
BUDGETS = ((BUDGET, False), (BUDGET, True), (KEEPS_ALL, False))  # that are served; in fp8


def serve(
    context: Context, budget: int | None, check: bool, measure: bool, cache_dtype: str = "auto"
) -> dict[str, Any]:
    """Short prompts to compare with dense attention; long ones at once, for their throughput.

    Both engines run without Inductor, whose compilation takes longer than all the rest, and with
    full CUDA graphs for decoding.
    """
    dry = context.device.dry
    model: Model = TINY if dry else VICUNA
    short = (60, 21, 33) if dry else (700, 90, 1000, 33, 512, 257, 640, 128)
    long, count, tokens = (150, 2, 5) if dry else (LONG, modes.REQUESTS, TOKENS)
    length = 512 if dry else LENGTH
    sizes = (256, 512) if dry else (4096, 11008)
    folder = modes.write_model(context.folder / "engines" / "full", model, *sizes, length)
    vocabulary = 128 if dry else 32000
    dense = "CPU_ATTN" if dry else "FLASH_ATTN"
    options: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32" if dry else "bfloat16",
        "attention_backend": dense if budget is None else "SPARSEMM",
        "max_model_len": length,
        "max_num_seqs": modes.REQUESTS,
        "max_num_batched_tokens": 512 if dry else LONG,
        "enable_prefix_caching": False,
        "kv_cache_dtype": cache_dtype,
    }
    if dry:
        options |= modes.MODES["eager"] | {"kv_cache_memory_bytes": 64 << 20}
    else:
        # Timed, an engine has the GPU for itself; if not, others may run beside it.
        memory: dict[str, Any] = {"gpu_memory_utilization": 0.85}
        if not measure:
            memory = {"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": 6 << 30}
        options |= modes.MODES["full"] | memory
        options["compilation_config"] |= {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    rounds = []
    if check:
        asked = modes.prompts(short, vocabulary)
        rounds.append({"prompts": asked, "every": 2, "tokens": 4 if dry else 32})
    if measure:
        asked = modes.prompts((long,) * count, vocabulary, seed=1)
        rounds.append({"prompts": asked, "every": 0, "tokens": tokens})
    window = 8 if dry else W
    own = None if budget is None else modes.settings(model, budget, window)
    job = {"options": options, "settings": own, "rounds": rounds}
    name = f"pair-{budget or 'dense'}-{cache_dtype}"
    result = modes.run_engine(context, name, job)
    for each in result["rounds"]:
        assert each["idle"], "blocks are held by nobody"
    asked = {"of_model": model.name, "prompt_tokens": long, "budget": budget}
    return result | asked | {"kv_cache_dtype": cache_dtype}


def dense(context: Context, cache_dtype: str = "auto") -> dict[str, Any]:
    """Dense attention as vLLM has it, with prompts to compare with only in bf16."""
    check = cache_dtype == "auto"
    result = serve(context, None, check, True, cache_dtype)
    assert context.device.dry or result["backend"] == ["FLASH_ATTN"], result["backend"]
    return result


def equal(context: Context) -> dict[str, Any]:
    """A budget that is larger than any prompt gives dense answers."""
    expected = context.wait("dense")
    result = serve(context, KEEPS_ALL, check=True, measure=False)
    assert result["backend"] == ["SPARSEMM"], result["backend"]
    (own,) = result["rounds"]
    assert own["pruned"] == 0, "a prompt was pruned that fits the budget"
    gate = modes.GATES["float32" if context.device.dry else "bfloat16"]
    return result | modes.compare(own["answers"], expected["rounds"][0]["answers"], gate)


def pruned(context: Context, cache_dtype: str = "auto") -> dict[str, Any]:
    """Long prompts, pruned."""
    result = serve(context, 40 if context.device.dry else BUDGET, False, True, cache_dtype)
    (own,) = result["rounds"]
    assert own["pruned"] == len(own["answers"]), f"{own['pruned']} prompts are pruned"
    return result


def cases(context: Context) -> Cases:
    """The dense engine first, since the others are compared with it."""
    return {
        "dense": partial(dense, context),
        "dense fp8": partial(dense, context, "fp8"),
        "pruned": partial(pruned, context),
        "budget over prompt": partial(equal, context),
        "pruned fp8": partial(pruned, context, "fp8"),
    }
