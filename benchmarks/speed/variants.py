"""The ways to serve a model that the speed commands compare.

Four are always of interest: dense attention and SPARSEMM, each with a cache of the model's own type
and with one of fp8. fp8 is what a user would switch on instead of pruning, so the honest baseline
is the faster of the two dense ones.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from sparsemm_vllm.environment import has_gpu

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Variant:
    """One way to serve a model.

    Attributes:
        name: name of its cells, and of its column in tables.
        method: SPARSEMM's method, or None for vLLM's dense attention.
        fp8: whether the KV cache holds fp8 (e4m3), one byte a number.
    """

    name: str
    method: str | None = None
    fp8: bool = False

    @property
    def backend(self) -> str:
        """vLLM's name of the attention backend."""
        return "SPARSEMM" if self.method else dense_backend()

    @property
    def options(self) -> dict[str, Any]:
        """Options of `vllm.LLM` for its cache."""
        return {"kv_cache_dtype": "fp8"} if self.fp8 else {}

    @property
    def words(self) -> list[str]:
        """The same options, as `vllm serve` spells them."""
        pairs = self.options.items()
        return [word for k, v in pairs for word in (f"--{k.replace('_', '-')}", v)]

    def token_bytes(self, subject: Any) -> int:
        """KV bytes of a token of a `Subject`, all layers and heads."""
        item = 1 if self.fp8 else subject.element_size
        return subject.token_bytes // subject.element_size * item


_ALL = (
    Variant("dense"),
    Variant("dense-fp8", fp8=True),
    Variant("sparsemm", "sparsemm"),
    Variant("sparsemm-fp8", "sparsemm", fp8=True),
    Variant("snapkv", "snapkv"),
)
VARIANTS = {variant.name: variant for variant in _ALL}
FOUR = ("dense", "dense-fp8", "sparsemm", "sparsemm-fp8")
DENSE = tuple(variant.name for variant in _ALL if variant.method is None)


def dense_backend() -> str:
    """Attention backend that a user would run otherwise."""
    return "FLASH_ATTN" if has_gpu() else "CPU_ATTN"


def add_option(parser: argparse.ArgumentParser, known: Sequence[str] = FOUR) -> None:
    """Add ``--variants``, a list of names.

    Args:
        parser: parser of a speed command.
        known: names that the command knows; by default it takes them all.
    """

    def names(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(known)}"
            )
        return list(dict.fromkeys(given))

    parser.add_argument(
        "--variants",
        type=names,
        default=list(known),
        metavar="NAME,...",
        help=f"what is compared: {', '.join(known)} (default: all)",
    )


def served_here(
    names: Iterable[str], head_size: int, dtype: str
) -> tuple[list[str], dict[str, str]]:
    """Which variants this device serves, and why it does not serve the others.

    Only caches of fp8 are looked at: where another cannot be served, the engine says why.

    Args:
        names: names of variants.
        head_size: elements of a head.
        dtype: torch's name of the model's type.

    Returns:
        Names that are served, and reasons by the names of the others.
    """
    names = list(names)
    quantized = [VARIANTS[name] for name in names if VARIANTS[name].fp8]
    backends = {variant.backend for variant in quantized}
    refusals = in_own_process(_refusals, sorted(backends), head_size, dtype) if backends else {}
    skipped = {v.name: refusals[v.backend] for v in quantized if v.backend in refusals}
    for name, reason in skipped.items():
        print(f"{name} is left out: {reason}", flush=True)
    return [name for name in names if name not in skipped], skipped


def _refusals(backends: Sequence[str], head_size: int, dtype: str) -> dict[str, str]:
    """Reasons of those backends that do not take a cache of fp8, in vLLM's words."""
    import torch
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    load_general_plugins()
    config = AttentionSelectorConfig(head_size, getattr(torch, dtype), "fp8", BLOCK_SIZE)
    found = {}
    for name in backends:
        try:
            current_platform.get_attn_backend_cls(AttentionBackendEnum[name], config)
        except ValueError as error:
            found[name] = str(error)
    return found


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns; the memory that it takes on a GPU is free again."""
    if not has_gpu():
        return function(*args)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def split(key: str) -> tuple[Variant, int | None]:
    """The variant and the budget of a key of figures: ``dense-fp8``, ``sparsemm-256``."""
    name, _, budget = key.rpartition("-")
    return (VARIANTS[name], int(budget)) if budget.isdigit() else (VARIANTS[key], None)


def by_size(cells: dict[str, Any]) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
    """Figures of decode cells by prompt tokens and batch, then by variant with its budget.

    Variants are measured in groups, a cell for each group. What is in two groups is taken once.

    Args:
        cells: cells by name, ``n=2048 batch=8 dense+sparsemm``.
    """
    found: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for name, cell in cells.items():
        n, batch = (int(word.partition("=")[2]) for word in name.split()[:2])
        own = found.setdefault((n, batch), {})
        for variant, figures in cell.items():
            if isinstance(figures, dict):
                own.setdefault(variant, figures)
    return dict(sorted(found.items()))


def ratios(figures: dict[str, dict[str, Any]], variant: str, key: str) -> list[float | None]:
    """How many times less of a quantity a variant takes than dense, and than dense with fp8.

    Args:
        figures: figures of a cell by variant.
        variant: name of the variant, with its budget.
        key: name of the quantity, a time.

    Returns:
        A ratio, or None where one of the two was not measured.
    """
    own = figures[variant].get(key)
    others = (figures.get(name, {}).get(key) for name in DENSE)
    return [other / own if own and other else None for other in others]


def shown(ratio: float | None) -> str:
    """A ratio for a table."""
    return "-" if ratio is None else f"{ratio:.2f}"
