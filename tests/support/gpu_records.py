"""Records of GPU runs that never were, as the suite writes them."""

import io
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DAY = datetime(2031, 5, 6, 23, tzinfo=UTC)
MACHINE = {
    "device": "Made-Up GPU 80GB", "cores": 3, "driver": "1.2.3", "torch": "9.9.0", "cuda": "99.1",
    "triton": "7.7.7", "vllm": "0.0.1", "transformers": "8.8.8", "commit": "c0ffee" * 6 + "beef",
    "changed": False,
}  # fmt: skip
LATER = MACHINE | {"commit": "decade" * 6 + "face"}
READ = 2e12  # bytes a second
FOLDER = Path("made-up-gpu-80gb") / "2031-05-06"


def step(megabytes: float, us: float, flash: float | None = None, **fields: Any) -> dict[str, Any]:
    """A decode case."""
    floor = 1e12 * megabytes / READ
    case = {"us": us, "us_20": 0.9 * us, "us_80": 1.2 * us, "kept_bytes": 1e6 * megabytes}
    case |= {"predicted_us": floor, "ratio": us / floor, "balance": 1.25, "layout": "LBHNC"}
    case |= {"model_us": 0.95 * us, "dtype": "bfloat16"} | fields
    return case if flash is None else case | {"flash": {"us": flash}, "times_flash": us / flash}


FP8 = {"dtype": "float8_e4m3fn"}
BENCH = {
    "copy bandwidth": {"us": 1.0, "bytes_per_second": 0.9 * READ},
    "read bandwidth": {"us": 1.0, "bytes_per_second": READ},
    "bf16 product": {"us": 1.0, "flop_per_second": 5e14},
    "decode toy-7b B=256 batch=8": step(40, 25.0),
    "decode toy-7b dense batch=8": step(1000, 520.0, 500.0),
    "decode toy-7b B=256 batch=8 fp8": step(20, 20.0, **FP8),
    "decode toy-7b dense batch=8 fp8": step(500, 270.0, 260.0, **FP8),
    "decode toy-7b B=256 batch=32": step(160, 90.0),
    "decode toy-7b B=256 batch=1": step(5, 8.0),
    "decode toy-7b B=256 batch=8 LBNHC": step(40, 30.0, layout="LBNHC"),
    "decode toy-gqa dense batch=1 n=32768": step(30, 22.0, 20.0),
    "decode toy-gqa B=256 batch=1 n=32768": step(1, 9.0),
    "trace of toy-7b B=256 batch=8": {
        "layers": [{"us": us, "most_items": 3} for us in (20.0, 24.0, 31.0)], "us_per_layer": 25.0,
    },
    "prune toy-7b n=8192": {
        **{op: {"us": us} for op, us in (("all", 900), ("scores", 500), ("select", 300))},
        "compact": {"us": 100}, "share_of_prefill": 0.0125,
    },
}  # fmt: skip


def engine(ms: float, blocks: int, **fields: Any) -> dict[str, Any]:
    """A case of a whole model."""
    answers = [{"tokens": [1, 2], "logprobs": [-1.0, -2.0], "gaps": [1, 1]}] * 8
    timed = {"answers": answers, "step_ms": ms, "tokens_per_second": 8e3 / ms, "idle": True}
    case = {"start_seconds": 44.0, "graphs": "FULL", "backend": ["X"], "blocks": 9000}
    asked = {"of_model": "toy-7b", "prompt_tokens": 8192}
    return case | {"rounds": [timed | {"most_blocks": blocks}]} | asked | fields


COMPARED = {
    "compared": 90, "of": 96, "swaps": 1,
    "differences": {"count": 90, "median": 1e-3, "q90": 2e-3, "q99": 9e-3, "largest": 2e-2},
}  # fmt: skip
PAIR = {
    "dense": engine(12.5, 4096),
    "dense fp8": engine(8.0, 4096),
    "pruned": engine(5.0, 300, budget=256),
    "pruned fp8": engine(4.0, 300, budget=256),
    "budget over prompt": engine(1.0, 300) | {"rounds": [{"idle": True}]} | COMPARED,
}
KERNELS = {
    "dtype=bf16 D=128": {"errors": {"sparse_decode": 3e-3}, "tolerance": 1e-2},
    "dtype=bf16 D=64": {"errors": {"sparse_decode": 5e-3}, "tolerance": 1e-2},
}


def record(part: str, cases: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What a part writes."""
    own = {"part": part, "dry_run": False, "source": "abc", "seconds": 9.0, "total": len(cases)}
    own |= {"names": list(cases), "cases": cases, "failed": {}, "machine": MACHINE}
    return own | fields


def pack(file: Path, documents: dict[str, Any], day: datetime = DAY) -> Path:
    """A tar of JSON files, and a log; compressed as its name says."""
    kind = file.suffix.removeprefix(".")
    with tarfile.open(file, "w" if kind == "tar" else f"w:{kind}") as tar:  # type: ignore[call-overload]
        for name, document in documents.items():
            text = document if isinstance(document, str) else json.dumps(document)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(text), int(day.timestamp())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return file


def first_run(folder: Path, kind: str = "gz") -> Path:
    """Kernels partial with a failure, timings complete."""
    failed = {"dtype=fp32 D=128": "Traceback\nAssertionError: sparse_decode: error | 3e-1"}
    names = [*KERNELS, *failed, "dtype=fp32 D=64"]
    kernels = record("kernels", KERNELS, names=names, failed=failed, total=4)
    documents = {
        "kernels.partial.json": kernels,
        "bench.json": record("bench", BENCH),
        "tune.json": record("tune", {"slow": {"bytes_per_second": 1e12, "balance": 1.5},
                                     "fast": {"bytes_per_second": 2e12, "balance": 1.1},
                                     "too large": {"bytes_per_second": 0.0, "balance": 0.0,
                                                   "skipped": "out of registers\nindeed"}}),
        "triton/abc/kernel.json": {"num_warps": 4},
        "jobs.json": {"jobs": {"ncu": {"status": "killed after 316 s"}, "tune": {"status": "ok"}}},
        "logs/bench.log": "no record",
    }  # fmt: skip
    return pack(folder / f"first.tar.{kind}", documents)


def second_run(folder: Path) -> Path:
    """Pairs, and what had failed; of a later commit."""
    mended = {"dtype=fp32 D=128": {"errors": {"sparse_decode": 1e-6}, "tolerance": 1e-4}}
    documents = {
        "kernels.partial.json": record("kernels", mended, total=4, machine=LATER),
        "pair.json": record("pair", PAIR, machine=LATER),
        "ncu.json": record(
            "ncu",
            {
                "decode a": {"counters": {"Duration": "12.50 us"}},
                "decode b": {"counters": {"DRAM": "9 %"}},
            },
            machine=LATER,
        ),
        "modes.json": record("modes", {"bfloat16 full": engine(1.0, 1) | COMPARED}, machine=LATER),
    }
    return pack(folder / "second.tar.xz", documents)
