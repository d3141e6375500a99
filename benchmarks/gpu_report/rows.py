"""What the cases of a GPU run say, by their names and fields; fields may be missing."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from speed.variants import VARIANTS

USUAL_PROMPT = 8192  # tokens; the suite names a prompt's length where it is another
PAIRS = {
    "dense": "dense",
    "dense fp8": "dense-fp8",
    "pruned": "sparsemm",
    "pruned fp8": "sparsemm-fp8",
}
Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Decode:
    """Attention of one layer in a decode step.

    Attributes:
        name: name of the case.
        model: name of the model's attention.
        batch: requests.
        n: prompt tokens of each.
        budget: tokens per KV head, or None: dense.
        fp8: whether the cache holds one byte a number.
        layout: vLLM's name of the cache's layout, if it is said.
        us: microseconds; the median.
        spread: microseconds at 20 and at 80 %.
        bytes: bytes of the KV that it reads.
        floor_us: microseconds in which the device reads so many bytes.
        model_us: microseconds that the cost model predicts.
        flash_us: microseconds of FlashAttention, which vLLM uses for dense attention.
        balance: load of the busiest program over the mean.
        differs: whether FlashAttention's output was another.
    """

    name: str
    model: str
    batch: int
    n: int
    budget: int | None
    fp8: bool
    layout: str
    us: float
    spread: tuple[float, float]
    bytes: float
    floor_us: float | None
    model_us: float | None
    flash_us: float | None
    balance: float | None
    differs: bool

    @property
    def variant(self) -> str:
        """Name of the variant; dense here is our kernel with all tokens."""
        return ("dense" if self.budget is None else "sparsemm") + ("-fp8" if self.fp8 else "")

    @property
    def size(self) -> tuple[str, int, int]:
        """What it is compared within: model, prompt and batch."""
        return self.model, self.n, self.batch

    @property
    def label(self) -> str:
        """A name without the word decode."""
        return self.name.removeprefix("decode ")


def cases(parts: Parts, part: str) -> dict[str, dict[str, Any]]:
    """Cases of a part by name; none if there is no record of it."""
    return parts.get(part, {}).get("cases", {})


def decodes(parts: Parts) -> list[Decode]:
    """Decode cases of `bench`, in their order."""
    found = cases(parts, "bench").items()
    return [_decode(name, c) for name, c in found if name.startswith("decode ") and "us" in c]


def _decode(name: str, case: dict[str, Any]) -> Decode:
    budget, batch, n = (re.search(rf"{key}=(\d+)", name) for key in ("B", "batch", "n"))
    flash = case.get("flash")
    us = case["us"]
    return Decode(
        name=name,
        model=name.split()[1],
        batch=int(batch[1]) if batch else 1,
        n=int(n[1]) if n else USUAL_PROMPT,
        budget=int(budget[1]) if budget else None,
        fp8="float8" in case.get("dtype", "") or "fp8" in f"{name} {case.get('dtype', '')}",
        layout=case.get("layout", ""),
        us=us,
        spread=(case.get("us_20", us), case.get("us_80", us)),
        bytes=case.get("kept_bytes", 0.0),
        floor_us=case.get("predicted_us"),
        model_us=case.get("model_us"),
        flash_us=flash["us"] if isinstance(flash, dict) else None,
        balance=case.get("balance"),
        differs=bool(case.get("differs")),
    )


def dense_us(rows: Iterable[Decode], size: tuple[str, int, int]) -> dict[str, float]:
    """FlashAttention's time with each cache, in microseconds; the faster layout's."""
    found: dict[str, float] = {}
    for row in rows:
        if row.size == size and row.budget is None and row.flash_us is not None:
            found[row.variant] = min(row.flash_us, found.get(row.variant, row.flash_us))
    return found


def rates(parts: Parts) -> dict[str, float]:
    """Bytes that the device copies and reads in a second, and FLOP: by the case's name."""
    return {
        name: case[key]
        for name, case in cases(parts, "bench").items()
        for key in ("bytes_per_second", "flop_per_second")
        if key in case
    }


def pairs(parts: Parts) -> dict[str, dict[str, Any]]:
    """Rounds in which whole models decoded, by variant: ms a step, tokens a second, blocks.

    And what was asked: ``of_model``, ``prompt_tokens`` and ``budget``, where the record says so.
    """
    found = {}
    for name, variant in PAIRS.items():
        case = cases(parts, "pair").get(name, {})
        if timed := [r for r in case.get("rounds", ()) if "step_ms" in r]:
            asked = ("of_model", "prompt_tokens", "budget")
            found[variant] = timed[-1] | {key: case.get(key) for key in asked}
    return {name: found[name] for name in VARIANTS if name in found}


def times_faster(own: float, dense: Iterable[float | None]) -> float | None:
    """How many times less time than the faster dense one; None if there is none."""
    known = [time for time in dense if time is not None]
    return min(known) / own if known and own else None


def failures(parts: Parts) -> list[dict[str, Any]]:
    """Every failure with its part, and whether the case has passed since."""
    return [
        {"part": part, "passed": each["case"] in record["cases"]} | each
        for part, record in parts.items()
        for each in record["failed"]
    ]


def left(record: dict[str, Any]) -> list[str]:
    """Names of a part's cases that neither passed nor failed."""
    failed = {each["case"] for each in record["failed"]}
    return [name for name in record["names"] if name not in record["cases"] and name not in failed]
