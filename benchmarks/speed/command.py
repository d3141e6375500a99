"""What the commands of speed benchmarks have in common; and where there is no GPU."""

import argparse
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import common
from models import FOLDER

from sparsemm_vllm.environment import has_gpu, quieten_vllm, use_cpu
from speed.results import Deadline, Results
from speed.subject import NARROW, Subject, full_size, reader, shrunk

Cells = dict[str, Callable[[Any], dict[str, Any]]]

LONGEST = 65_536  # tokens of prompt and answer


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of all of them."""
    parser = common.make_parser(description)
    parser.add_argument(
        "--model",
        help="of benchmarks/models; else the bundled one (without a GPU it is shrunk, and shows "
        "no more than that the command works)",
    )
    parser.add_argument("--models", type=Path, default=FOLDER, help="folder where they are made")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--pieces-of", type=float, default=450, metavar="SECONDS")
    parser.add_argument("--no-inductor", action="store_true", help="CUDA graphs, no compilation")
    return parser


def prepare(
    model: str | None, models: Path = FOLDER, no_inductor: bool = False
) -> tuple[Subject, dict[str, Any]]:
    """The model, and options of `vllm.LLM` for it; before vLLM is imported.

    Args:
        model: name of a model of benchmarks/models, or none for the bundled one.
        models: folder in which models are made.
        no_inductor: whether CUDA graphs are captured of what is not compiled.
    """
    if not has_gpu():
        use_cpu()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # saves a start of Python and vLLM
    quieten_vllm()
    if model is None:
        return reader(), {"enforce_eager": True, "dtype": "float32"}
    # Prompts may be longer than the model was made for: nobody reads what it answers.
    text: dict[str, Any] = {"max_position_embeddings": LONGEST}
    options: dict[str, Any] = {"load_format": "dummy"}
    if has_gpu():
        subject = full_size(model, models)
        options |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.15}  # pools have sizes
        if no_inductor:
            options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    else:
        subject = shrunk(model, models)
        options |= {"dtype": "float32", "enforce_eager": True}
        text |= NARROW
        options["hf_overrides"] = {"vision_config": {"num_hidden_layers": 1, "depth": 1}}
    options.setdefault("hf_overrides", {})["text_config"] = text
    return subject, options


def measure_groups(
    results: Results,
    groups: Iterable[tuple[Callable[[], AbstractContextManager[Any]], Cells]],
    deadline: Deadline,
) -> bool:
    """Measure what is missing, a group of engines after the other; whether nothing is left.

    Args:
        results: file that cells are added to.
        groups: functions that open engines for a while, and their cells: functions of what was
            opened, by name.
        deadline: end of the time.
    """
    for opened, cells in groups:
        left = {name: cell for name, cell in cells.items() if name not in results.cells}
        if not left:
            continue
        if deadline.left <= 0:
            return False
        with opened() as engines:
            for name, cell in left.items():
                if deadline.left <= 0:
                    return False
                results.save(name, cell(engines))
                print(f"{name}: measured", flush=True)
    return True


def finish(results: Results, table: str, done: bool) -> None:
    """Print what there is, and end with the status that tells whether it is all."""
    print(table)
    print(f"{results.file}: {'all cells' if done else 'cells are left; run it again'}")
    raise SystemExit(0 if done else common.TIME_IS_OVER)
