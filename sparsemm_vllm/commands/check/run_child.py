"""The process of `sparsemm check --run` that has the engine: one line of JSON for each result."""

import argparse
import faulthandler
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.cases import (
    BLOCK_SIZE,
    BUDGET,
    CASES,
    LARGEST_BUDGET,
    MAX_TOKENS,
    POOL_BLOCKS,
    REFERENCE,
    START,
    STEP_TOKENS,
    WINDOW,
    Case,
    Seen,
    row_name,
    without_repetitions,
)
from sparsemm_vllm.commands.check.engine import Answer, Engine, EngineError, ask
from sparsemm_vllm.commands.check.judge import TOLERANCES, References, judge, judge_references
from sparsemm_vllm.commands.check.model import KV_HEADS, make_llava, skewed_profile
from sparsemm_vllm.commands.check.results import Results, Row
from sparsemm_vllm.environment import has_gpu

LAYERS = 2
PATIENCE = 120.0  # seconds for the answers to a case; a GPU's kernels are compiled in it


def open_engine(model: Path, dtype: str) -> Engine:
    """Start the engine that is checked.

    Args:
        model: folder of the model.
        dtype: data type, `float32` or `bfloat16`.

    Raises:
        EngineError: if its pool is not the one that was asked for.
    """
    options: dict[str, Any] = {}
    if has_gpu():  # of its memory, a little must be free; CUDA graphs, as users run them, once
        options = {"gpu_memory_utilization": 0.05, "enforce_eager": dtype == "float32"}
    settings = {
        "budget": BUDGET,
        "window": WINDOW,
        "max_request_budget": LARGEST_BUDGET,
        "profile": skewed_profile(layers=LAYERS).model_dump(mode="json"),
    }
    engine = Engine(
        model,
        settings,
        dtype=dtype,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=POOL_BLOCKS + 1,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=256,
        limit_mm_per_prompt={"image": 2},
        disable_log_stats=False,
        **options,
    )
    blocks = engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    if blocks != POOL_BLOCKS + 1:
        raise EngineError(f"vLLM made {blocks} KV blocks instead of {POOL_BLOCKS + 1}")
    return engine


def serve(engine: Engine, case: Case) -> tuple[list[Answer], Seen]:
    """Let the engine answer the requests of a case, all at once.

    Raises:
        EngineError: if they are never answered, or vLLM lacks a metric.
    """
    if not case.keeps_cache:
        engine.forget()
    blocks: list[int] = []
    before = metric(engine, "vllm:num_preemptions")
    answers = engine.generate(
        *(ask(request.text, *request.pictures) for request in case.requests),
        max_tokens=MAX_TOKENS,
        extra_args=[request.extra_args for request in case.requests],
        watch=lambda: blocks.append(held_blocks(engine)),
        patience=PATIENCE,
    )
    seen = Seen(
        [answer.prompt_tokens for answer in answers],
        [answer.cached_tokens for answer in answers],
        without_repetitions(blocks),
        round(metric(engine, "vllm:num_preemptions") - before),
    )
    return answers, seen


def metric(engine: Engine, name: str) -> float:
    """The value of one of vLLM's metrics.

    Raises:
        EngineError: if this vLLM does not have it.
    """
    values = [metric.value for metric in engine.llm.get_metrics() if metric.name == name]
    if len(values) != 1:
        raise EngineError(f"vLLM has {len(values)} metrics {name} instead of one")
    return values[0]


def held_blocks(engine: Engine) -> int:
    """KV blocks that requests hold now."""
    return round(metric(engine, "vllm:kv_cache_usage_perc") * POOL_BLOCKS)


def check(folder: Path, dtypes: list[str], results: Results) -> None:
    """Make the model, serve it with an engine of each data type, and write what was found.

    Args:
        folder: folder for the model.
        dtypes: data types of the engines.
        results: file for the rows.
    """
    model = folder / "model"
    made: list[References] = []

    def refer() -> Row:
        make_llava(model, layers=LAYERS)
        scores = skewed_profile(layers=LAYERS).tensor()
        made.append(References(model, CacheLayout.from_scores(scores, KV_HEADS, BUDGET, WINDOW)))
        return judge_references(made[0])

    if not results.run(REFERENCE, refer):
        return
    for dtype in dtypes:
        if not check_engine(model, dtype, dtypes, made[0], results):
            return


def check_engine(
    model: Path, dtype: str, dtypes: list[str], references: References, results: Results
) -> bool:
    """Start an engine and serve all cases.

    Args:
        model: folder of the model.
        dtype: data type of the engine.
        dtypes: data types of all engines.
        references: answers that it should give.
        results: file for the rows.

    Returns:
        Whether all cases were served: after an exception an engine is not asked again.
    """
    engines: list[Engine] = []
    tolerance = TOLERANCES["gpu" if has_gpu() else "cpu", dtype]

    def start() -> Row:
        engines.append(open_engine(model, dtype))
        finding = f"{dtype}, {POOL_BLOCKS} blocks"
        return Row(name=START, status="ok", finding=finding)

    def run(case: Case) -> Row:
        answers, seen = serve(engines[0], case)
        return judge(case, answers, seen, references, tolerance)

    work: list[tuple[str, Callable[[], Row]]] = [(START, start)]
    work += [(case.name, partial(run, case)) for case in CASES]
    return all(results.run(row_name(name, dtype, dtypes), do) for name, do in work)


def device() -> str:
    """The name of what the engine runs on."""
    if not has_gpu():
        return "CPU"
    import torch  # takes seconds

    return str(torch.cuda.get_device_name())


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="folder for the model")
    parser.add_argument("results", type=Path, help="file for a line of JSON for each result")
    parser.add_argument("dtypes", help="data types of the engines, separated by commas")
    parser.add_argument("seconds", type=float, help="time after which the log gets a stack trace")
    arguments = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(arguments.seconds)
    results = Results(arguments.results)
    results.write(device=device())
    check(arguments.folder, arguments.dtypes.split(","), results)


if __name__ == "__main__":
    main()
