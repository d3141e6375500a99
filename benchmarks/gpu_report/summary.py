"""The summary of a GPU run's folder, in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import markdown
from speed.variants import DENSE

from gpu_report.rows import Decode, Parts, cases, decodes, dense_us, failures, left, pairs, rates
from sparsemm_vllm.files import write_whole

NAME = "summary.md"
FACTS = ("driver", "cuda", "torch", "triton", "vllm", "transformers", "cores")
BASELINE = (
    "The baseline is the faster of vLLM's dense attention with a bf16 and with an fp8 cache; a "
    "ratio above 1 means that SPARSEMM is faster."
)
KNOWN = ("pair", "bench", "tune", "modes", "kernels", "methods", "ncu")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table and an empty line; without rows, nothing."""
    lines = markdown(head, rows)
    return [*lines, ""] if lines else []


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number with its unit, or a dash for none."""
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def write(folder: Path, parts: Parts, pictures: dict[str, Path]) -> Path:
    """Write the summary of a folder and return its file."""
    file = folder / NAME
    write_whole(file, "\n".join(summary(parts, folder.name, pictures)).rstrip() + "\n")
    return file


def title(parts: Parts, day: str) -> str:
    """Device and day, and that a dry run is one."""
    first = next(iter(parts.values()))
    dry = " (a dry run: the figures mean nothing)" if first["dry_run"] else ""
    return f"{first['machines'][0]['device']}, {day}{dry}"


def summary(parts: Parts, day: str, pictures: dict[str, Path]) -> list[str]:
    """Lines of the summary.

    Args:
        parts: records by part.
        day: day of the measurements.
        pictures: files in the same folder by name.
    """
    # Parts that say most come first, those that are not known here last.
    in_order = {part: parts[part] for part in (*KNOWN, *parts) if part in parts}
    return [
        f"# {title(parts, day)}",
        "",
        "Written by `python benchmarks/report.py gpu` from the records in this folder.",
        "",
        *machines(in_order),
        *overview(in_order),
        *problems(in_order),
        *sections(in_order, pictures),
    ]


def sections(parts: Parts, pictures: dict[str, Path] | None = None) -> list[str]:
    """Lines of the figures: a table or two for each part, what says most first.

    Args:
        parts: records by part; of each its ``cases`` are looked at.
        pictures: files in the same folder by name.
    """
    shown = {name: [f"![{name}]({file.name})", ""] for name, file in (pictures or {}).items()}
    others = [part for part in parts if part not in KNOWN]
    return [
        *_section("Whole decode steps (pair)", [*_steps(parts), *shown.get("steps", [])]),
        *_section(
            "Attention of one layer in a decode step (bench)",
            [*_decode(parts), *shown.get("bytes", []), *shown.get("prediction", [])],
        ),
        *_section("Layers of one traced decode step (bench)", _traces(parts)),
        *_section("Pruning a prompt (bench)", _prunes(parts)),
        *_section("Variants of the decode kernel (tune)", _tune(parts)),
        *_section("Answers of engines (modes, pair)", _answers(parts)),
        *_section("Kernels beside their torch twins (kernels, methods)", _kernels(parts)),
        *_section("Counters of one decode launch (ncu)", _counters(parts)),
        *[line for part in others for line in _section(part, _other(parts[part]))],
    ]


def _section(name: str, lines: list[str]) -> list[str]:
    return [f"## {name}", "", *lines] if lines else []


def machines(parts: Parts) -> list[str]:
    """Driver, versions and commits, a row for each different machine."""
    found: dict[tuple[str, ...], list[str]] = {}
    for part, record in parts.items():
        for machine in record["machines"]:
            facts = [str(machine.get(fact) or "-") for fact in FACTS]
            found.setdefault((*facts, commit_of(machine)), []).append(part)
    rows = [(*facts, ", ".join(names)) for facts, names in found.items()]
    return table((*FACTS, "commit", "parts"), rows)


def commit_of(machine: dict[str, Any]) -> str:
    """The commit that was measured, and whether its files were changed."""
    return machine["commit"][:12] + (" with changes" if machine.get("changed") else "")


def overview(parts: Parts) -> list[str]:
    """How far each part got."""
    return table(
        ("part", "cases passed", "failures", "state"),
        [
            (part, f"{len(r['cases'])} of {r['total'] or '?'}", str(len(r["failed"])), state(r))
            for part, r in parts.items()
        ],
    )


def state(record: dict[str, Any]) -> str:
    """Whether a part is complete, in words."""
    return "complete" if record["complete"] else "**partial**"


def problems(parts: Parts) -> list[str]:
    """What failed, what was not measured, and notes."""
    lines = []
    for each in failures(parts):
        passed = "; passed in another run" if each["passed"] else ""
        last = each["error"].strip().splitlines()[-1][:300] if each["error"].strip() else ""
        lines.append(
            f"* **failed**: {each['part']}, {each['case']} (commit {each['commit'][:12]}{passed}): "
            f"`{last.replace('`', chr(39))}`"
        )
    for part, record in parts.items():
        if names := left(record):
            lines.append(f"* not measured: {part}: {', '.join(names)}")
    lines += [f"* skipped: {part}, {name}: {why}" for part, name, why in skipped(parts)]
    notes = dict.fromkeys(note for record in parts.values() for note in record["notes"])
    lines += [f"* {note}" for note in notes]
    return _section("What is missing", [*lines, ""]) if lines else []


def skipped(parts: Parts) -> list[tuple[str, str, str]]:
    """Cases, or FlashAttention beside them, that were left out: part, case and reason."""
    return [
        (part, name, reason.removeprefix("skipped: ").splitlines()[0])
        for part, record in parts.items()
        for name, case in record["cases"].items()
        for reason in (case.get("skipped"), case.get("flash"))
        if isinstance(reason, str) and reason
    ]


def _steps(parts: Parts) -> list[str]:
    found = pairs(parts)
    rows = [
        (
            name,
            number(r["step_ms"], 2),
            number(r.get("tokens_per_second")),
            r.get("requests") or "-",
            r.get("most_blocks", "-"),
            *(_ratio(found, name, other) for other in DENSE),
        )
        for name, r in found.items()
    ]
    heads = ("variant", "ms a step", "tokens/s", "requests", "KV blocks at most", *_over())
    return [*table(heads, rows), *([BASELINE, ""] if found.keys() & set(DENSE) else ())]


def _over() -> list[str]:
    return [f"times faster than {name}" for name in DENSE]


def _ratio(found: dict[str, dict[str, Any]], name: str, dense: str) -> str:
    if name in DENSE or dense not in found:
        return "-"
    return number(found[dense]["step_ms"] / found[name]["step_ms"], 2)


def _decode(parts: Parts) -> list[str]:
    rows = decodes(parts)
    lines = [
        f"* {name}: {speed / 1e12:,.1f} TFLOP/s"
        if "product" in name
        else f"* {name}: {speed / 1e9:,.1f} GB/s"
        for name, speed in rates(parts).items()
    ]
    head = ("case", "layout", "us (20 to 80 %)", "MB", "floor us", "us / floor", "model us")
    head = (*head, "balance", "FlashAttention us", *_over())
    measured = table(head, [_decode_cells(row, dense_us(rows, row.size)) for row in rows])
    return [*lines, "", *measured] if lines or measured else []


def _decode_cells(row: Decode, flash: dict[str, float]) -> list[str]:
    """Cells of a decode step beside FlashAttention's times of the same size."""
    return [
        row.label,
        row.layout or "-",
        f"{row.us:,.1f} ({row.spread[0]:,.1f} to {row.spread[1]:,.1f})",
        number(row.bytes / 1e6),
        number(row.floor_us),
        number(None if row.floor_us is None else row.us / row.floor_us, 2),
        number(row.model_us),
        number(row.balance, 2),
        number(row.flash_us) + " (another output)" * row.differs,
        *(
            "-" if row.budget is None or name not in flash else number(flash[name] / row.us, 2)
            for name in DENSE
        ),
    ]


def _traces(parts: Parts) -> list[str]:
    rows = []
    for name, case in cases(parts, "bench").items():
        if layers := case.get("layers"):
            times = sorted(layer["us"] for layer in layers)
            shown = sum(times) / len(times), times[0], times[len(times) // 2], times[-1]
            most = max(layer.get("most_items", 0) for layer in layers) or "-"
            rows.append((name, len(times), *map(number, shown), most))
    head = ("step", "layers", "mean us", "fastest", "median", "slowest", "items of a program, most")
    return table(head, rows)


def _prunes(parts: Parts) -> list[str]:
    rows = []
    for name, case in cases(parts, "bench").items():
        if name.startswith("prune ") and "all" in case:
            steps = (case[op]["us"] / 1e3 for op in ("all", "scores", "select", "compact"))
            share = case.get("share_of_prefill")
            percent = number(None if share is None else 100 * share, 2, " %")
            rows.append((name.removeprefix("prune "), *(number(ms, 2) for ms in steps), percent))
    return table(("prompt", "ms", "scores", "select", "compact", "of the prefill, estimated"), rows)


def _tune(parts: Parts) -> list[str]:
    found = cases(parts, "tune")
    rate = {name: case.get("bytes_per_second", 0.0) for name, case in found.items()}
    rows = [
        (name, number(rate[name] / 1e9), number(found[name].get("balance"), 2))
        for name in sorted(rate, key=lambda name: -rate[name])
    ]
    return table(("variant", "GB/s", "balance"), rows)


def _answers(parts: Parts) -> list[str]:
    rows = []
    for part in ("modes", "pair"):
        for name, case in cases(parts, part).items():
            found, waits = case.get("differences"), case.get("sync_warnings")
            found = found if isinstance(found, dict) else {}
            largest = found.get("largest", case.get("largest_difference"))
            quantiles = (*(found.get(key) for key in ("median", "q90", "q99")), largest)
            rows.append(
                (
                    f"{part}: {name}",
                    case.get("graphs", "-"),
                    number(case.get("start_seconds"), 0, " s"),
                    f"{case['compared']} of {case.get('of', '?')}" if "compared" in case else "-",
                    case.get("swaps", "-"),
                    *map(_small, quantiles),
                    sum(waits.values()) if isinstance(waits, dict) else "-",
                )
            )
    head = ("engine", "graphs", "start", "tokens compared", "swaps", "median", "90 %", "99 %")
    lines = table((*head, "largest", "waits for the GPU"), rows)
    return [*lines, "Differences are of log-probabilities.", ""] if lines else []


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _kernels(parts: Parts) -> list[str]:
    found: dict[tuple[str, float], list[float]] = {}
    for case in cases(parts, "kernels").values():
        for op, error in case.get("errors", {}).items():
            found.setdefault((op, case.get("tolerance", float("nan"))), []).append(error)
    rows = [
        (op, _small(allowed), _small(max(errors)), len(errors))
        for (op, allowed), errors in sorted(found.items())
    ]
    lines = table(("kernel", "allowed", "largest error", "cases"), rows)
    if "methods" in parts:
        lines += [f"* methods: {len(cases(parts, 'methods'))} cases are as on the CPU", ""]
    return lines


def _counters(parts: Parts) -> list[str]:
    found = {n: case["counters"] for n, case in cases(parts, "ncu").items() if case.get("counters")}
    names = dict.fromkeys(key for counters in found.values() for key in counters)
    rows = [(key, *(own.get(key, "-") for own in found.values())) for key in names]
    return table(("counter", *found), rows)


def _other(record: dict[str, Any]) -> list[str]:
    """A part that is not known here: the numbers of its cases."""
    rows = [
        (name, ", ".join(f"{k} {_word(v)}" for k, v in case.items() if k != "commit"))
        for name, case in record["cases"].items()
    ]
    return table(("case", "figures"), rows)


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict | list):
        return f"({len(value)} entries)"
    return str(value).replace("|", "/").replace("\n", " ")[:80]
