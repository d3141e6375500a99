"""Pictures, summaries and the README's tables from the JSON of the benchmarks: no number is typed.

    python benchmarks/report.py curves benchmarks/results/*/*/decode-latency-*.json
    python benchmarks/report.py gpu results-1.tar.gz results-2.tar.gz
    python benchmarks/report.py readme

`curves` draws a PNG beside each file: time of a decode step over the prompt's length, a panel for
each batch, and the floors. `gpu` takes what a run of `gpu_suite.py` or `gpu_run.sh` brought back,
tars or folders, earlier runs first: it puts the records into
``benchmarks/results/<device>/<date>/``, adds them to what is there, and writes a summary with
pictures beside them. `readme` writes the tables between the README's markers anew.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer
from common import RESULTS, ROOT, markdown
from gpu_report import archive, plots, summary
from gpu_report.plots import COLOURS
from gpu_report.readme import readme_table
from rich.console import Console
from speed.variants import by_size, split

from sparsemm_vllm.commands.figures import plot_axes, save_figure, styled
from sparsemm_vllm.files import write_whole

README = ROOT / "README.md"
END = "<!-- end -->\n"
SHOWN = (3072, 8192, 32768)  # prompt tokens

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()


@app.command()
def curves(files: Annotated[list[Path], typer.Argument(help="Of decode_latency.py.")]) -> None:
    """Draw decode latency."""
    for file in files:
        picture = file.with_suffix(".png")
        draw_decode(json.loads(file.read_text()), picture)
        console.print(str(picture), soft_wrap=True)


def decode_points(document: dict[str, Any]) -> dict[int, dict[str, list[tuple[int, float, float]]]]:
    """By batch and variant: prompt tokens, ms a step, and its floor. Dense is taken once."""
    points: dict[int, dict[str, list[tuple[int, float, float]]]] = {}
    for (n, batch), figures in by_size(document["cells"]).items():
        for variant, r in figures.items():
            if "step_ms" in r:
                line = points.setdefault(batch, {}).setdefault(variant, [])
                line.append((n, r["step_ms"], r["floor_ms"]))
    return {batch: points[batch] for batch in sorted(points)}


@styled()
def draw_decode(document: dict[str, Any], picture: Path) -> None:
    """A panel for each batch."""
    points = decode_points(document)
    figure, axes = plt.subplots(
        1, len(points), figsize=(2.7 + 3.5 * len(points), 3.8), squeeze=False, layout="constrained"
    )
    for panel, (batch, variants) in zip(axes[0], points.items(), strict=True):
        for i, (variant, line) in enumerate(variants.items()):
            n, step, floor = zip(*sorted(line), strict=True)
            colour = COLOURS[split(variant)[0].name]
            mark = "osD^v"[i % 5]
            panel.plot(n, step, marker=mark, color=colour, label=variant, linewidth=1.6)
            panel.plot(n, floor, color=colour, linestyle=":", linewidth=1)
        panel.set(title=f"batch {batch}", xlabel="prompt tokens", xscale="log")
        panel.set_xticks(n, [f"{tokens:,}" for tokens in n], minor=False, fontsize=8)
        panel.set_xticks([], minor=True)
        panel.set_ylim(bottom=0)
        plot_axes(panel)
    axes[0][0].set_ylabel("ms a decode step")
    handles = {line.get_label(): line for panel in axes[0] for line in panel.get_lines()[::2]}
    figure.legend(
        handles=list(handles.values()), loc="outside right center", frameon=False, fontsize=8.5
    )
    machine, asked = document["machine"], document["asked"]
    figure.suptitle(f"{asked['model']} on {machine['device']} (dotted: floor)", fontsize=11)
    save_figure(figure, picture)
    plt.close(figure)


@app.command()
def gpu(
    files: Annotated[list[Path], typer.Argument(help="Tars or folders, earlier runs first.")],
    results: Annotated[Path, typer.Option(help="Folder of all results.")] = RESULTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="They are of dry runs.")] = False,
) -> None:
    """Keep what a GPU run measured, and write its summary and pictures."""
    try:
        runs = [archive.read(file) for file in files]
        kept = archive.keep(runs, results, dry_run)
    except archive.ArchiveError as error:
        console.print(f"[red]{error}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    for folder, parts in kept.items():
        pictures = plots.draw(parts, summary.title(parts, folder.name), folder)
        console.print(str(summary.write(folder, parts, pictures)), soft_wrap=True)


@app.command()
def readme(
    file: Annotated[Path, typer.Option(help="Markdown file with the markers.")] = README,
) -> None:
    """Write the tables between their markers."""
    try:
        write_whole(file, with_tables(file.read_text(), TABLES))
    except ValueError as error:
        console.print(f"[red]{file}: {error}[/]", soft_wrap=True)
        raise typer.Exit(1) from None


def with_tables(
    text: str, tables: dict[str, Callable[[], list[str]]], script: str = Path(__file__).name
) -> str:
    """The text, with today's tables.

    Args:
        text: text with the markers of all tables.
        tables: functions that make the lines of each table.
        script: name of the benchmark in the markers.

    Raises:
        ValueError: if a table's markers are missing.
    """
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- table {name}, by benchmarks/{script} -->\n")
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"the markers of the table {name} are missing")
        text = before + begin + "\n".join(table()) + "\n" + end + after
    return text


def accounting() -> list[str]:
    """KV bytes of a request; LLaVA-1.5 has the language model of LLaVA-NeXT-Vicuna."""
    rows = json.loads((RESULTS / "kv-accounting.json").read_text())
    cells = [
        (
            r["model"],
            f"{r['prompt_tokens']:,}",
            f"{r['dense_bytes'] / 1e6:,.0f} MB",
            f"{r['held_bytes'] / 1e6:,.1f} MB",
            f"{r['times_less']:.1f}",
            f"{r['times_ideal'] - 1:.0%}",
        )
        for r in rows
        if r["budget"] == 256 and r["prompt_tokens"] in SHOWN and "1.5" not in r["model"]
    ]
    heads = ("model", "prompt tokens", "dense", "SPARSEMM", "times less", "above ideal")
    return markdown(heads, cells)


def simulation() -> list[str]:
    """The scheduler's figures, dense beside pruned."""
    found = json.loads((RESULTS / "simulated-serving.json").read_text())
    dense, sparse, cpu = found["dense"], found["sparsemm"], found["decode_step_cpu"]
    return [
        "| | dense | SPARSEMM |",
        "| --- | --- | --- |",
        f"| requests running, mean and most | {dense['mean_running']:g}, {dense['most_running']} | "
        f"{sparse['mean_running']:g}, {sparse['most_running']} |",
        f"| preemptions | {dense['preemptions']} | {sparse['preemptions']} |",
        f"| scheduler's CPU time a step, {found['max_num_seqs']} requests running | "
        f"{cpu['dense']['median_ms']:.1f} ms | {cpu['sparsemm']['median_ms']:.1f} ms "
        f"({cpu['ratio']:.2f} times) |",
        f"| all finished after, modelled | {dense['makespan_s']:.0f} s | "
        f"{sparse['makespan_s']:.0f} s |",
    ]


TABLES = {
    "gpu": partial(readme_table, RESULTS, README),
    "accounting": accounting,
    "simulation": simulation,
}

if __name__ == "__main__":
    app()
