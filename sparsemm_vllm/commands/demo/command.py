"""`sparsemm demo`: the bundled model reads a new picture from a pruned KV cache."""

import difflib
import json
import platform
import random
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.profile import load_profile
from sparsemm_vllm.commands.client import data_url, metric, png, pool_blocks
from sparsemm_vllm.commands.server import STAGES, Server, ServerError
from sparsemm_vllm.data.pictures import DEMO_SEEDS, Sample, make_demo_sample
from sparsemm_vllm.engine.worker.probes.kept import load_kept
from sparsemm_vllm.environment import has_gpu
from sparsemm_vllm.files import write_whole
from sparsemm_vllm.processes import ended_by_signals
from sparsemm_vllm.reader import READER, reader_folder

BLOCK_SIZE = 16
WINDOW = 16
MAX_TOKENS = 64


@dataclass(frozen=True)
class Outcome:
    """What was seen of one request.

    Attributes:
        answer: the model's.
        request_id: the API's.
        prompt_tokens: `n`, as the server counted it.
        seconds: to the first token, and to the last.
        blocks: KV blocks held, by the server's metrics, one reading after the other.
    """

    answer: str
    request_id: str
    prompt_tokens: int
    seconds: tuple[float, float]
    blocks: list[int]

    @property
    def blocks_seen(self) -> tuple[int, int] | None:
        """While pruning and after it; none if the readings missed one of the two."""
        if not self.blocks:
            return None
        peak = max(self.blocks)
        later = [b for b in self.blocks[self.blocks.index(peak) :] if b < peak]
        return (peak, later[0]) if later else None


def run_demo(out: Path, seed: int | None, budget: int) -> int:
    """Run the demo and print it.

    Args:
        out: folder for the picture, the report and the server's log.
        seed: of the picture; random if none.
        budget: tokens per KV head on average.

    Returns:
        The exit code: 0, or 1 if the server failed, or 130 after Ctrl-C.

    Raises:
        OSError: naming the file, if one cannot be written.
    """
    console = Console()
    if budget <= WINDOW:
        console.print(f"--budget must be larger than the window of {WINDOW} tokens, got {budget}")
        return 2
    chosen = random.randrange(len(DEMO_SEEDS)) if seed is None else seed
    sample = make_demo_sample(DEMO_SEEDS.start + chosen, "read")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "picture.png", png(sample.image))
    settings = {
        "profile": READER,
        "budget": budget,
        "window": WINDOW,
        "record_kept": str((out / "kept").resolve()),
    }
    try:
        arguments = _arguments(settings)
        server = Server(str(reader_folder()), arguments, out / "server.log", _OFFLINE)
        with ended_by_signals(), server:
            _wait(server, console)
            outcome = _ask(server, sample, console)
    except ServerError as error:
        console.print("[red]sparsemm demo:[/]", Text(str(error)), soft_wrap=True)
        console.print(f"The whole log: {out / 'server.log'}")
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; the server is stopped.")
        return 130
    report = _report(sample, outcome, settings, chosen)
    _show(report, console)
    _save(report, sample, outcome, out)
    for name in ("picture.png", "report.png", "report.json", "server.log"):
        console.print(f"saved {out / name}", highlight=False)
    return 0


_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def _arguments(settings: dict[str, Any]) -> list[str]:
    arguments = {
        "--attention-backend": "SPARSEMM",
        "--served-model-name": READER,
        "--dtype": "bfloat16" if has_gpu() else "float32",
        "--max-model-len": "1024",
        "--max-num-seqs": "8",
        "--block-size": str(BLOCK_SIZE),
        "--kv-cache-memory-bytes": str(64 << 20),
        "--additional-config": json.dumps({"sparsemm": settings}),
    }
    return [word for pair in arguments.items() for word in pair] + ["--enforce-eager"]


def _wait(server: Server, console: Console) -> None:
    where = "the GPU" if has_gpu() else "the CPU: under a minute"
    console.print(f"Starting vllm serve --attention-backend SPARSEMM on {where}.")
    columns = BarColumn(24), TimeElapsedColumn(), TextColumn("{task.fields[stage]}")
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("start", total=len(STAGES), stage="Python starts")
        server.wait_until_ready(
            on_stage=lambda count, stage: progress.update(bar, completed=count, stage=stage)
        )


class _BlockWatch(threading.Thread):
    """Reads the number of KV blocks in use from the server's metrics, again and again."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/metrics"
        self._done = threading.Event()
        self.blocks: list[int] = []

    def run(self) -> None:
        with httpx.Client() as client:
            while not self._done.is_set():
                try:
                    metrics = client.get(self._url).text
                except httpx.TransportError:  # the server is gone; whoever asks it will say so
                    return
                total = pool_blocks(metrics) - 1
                self.blocks.append(round(metric(metrics, "vllm:kv_cache_usage_perc") * total))
                self._done.wait(0.005)

    def stop(self) -> None:
        self._done.set()
        self.join()


def _ask(server: Server, sample: Sample, console: Console) -> Outcome:
    console.print(f"[bold]Question[/]   {sample.question}")
    console.print(f"[bold]True text[/]  {sample.answer}")
    console.print("[bold]Answer[/]     ", end="")
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    watch = _BlockWatch(server)
    watch.start()
    words, times, prompt_tokens, request_id = [], [time.monotonic()], 0, ""
    try:
        for chunk in client.chat.completions.create(
            model=READER,
            messages=_messages(sample),
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        ):
            request_id = chunk.id
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    words.append(choice.delta.content)
                    times.append(time.monotonic())
                    console.print(Text(choice.delta.content), end="")
    except OpenAIError as error:
        server.check_alive(patience=10.0)  # the better reason, if it died
        raise ServerError(f"the request failed: {error}\n{server.last_lines()}") from error
    finally:
        watch.stop()
    console.print("\n")
    return Outcome(
        answer="".join(words).strip(),
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        seconds=(times[1] - times[0], times[-1] - times[0]),
        blocks=[blocks for blocks in watch.blocks if blocks],
    )


def _messages(sample: Sample) -> Any:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(sample.image)}},
        {"type": "text", "text": sample.question},
    ]
    return [{"role": "user", "content": content}]


def _report(
    sample: Sample, outcome: Outcome, settings: dict[str, Any], seed: int
) -> dict[str, Any]:
    profile = load_profile(READER)
    layout = CacheLayout.from_scores(
        profile.tensor(), profile.num_kv_heads, settings["budget"], settings["window"]
    )
    n = outcome.prompt_tokens
    kept = layout.kept_tokens(n) + layout.window if layout.is_pruned(n) else np.full((1, 1), n)
    true, said = sample.answer.split(), outcome.answer.split()
    return {
        "seed": seed,
        "question": sample.question,
        "true_text": sample.answer,
        "answer": outcome.answer,
        "words": len(true),
        "words_right": words_in_order(true, said),
        "prompt_tokens": n,
        "pruned": layout.is_pruned(n),
        "kept_per_head": {
            "min": int(kept.min()),
            "median": float(np.median(kept)),
            "max": int(kept.max()),
        },
        "kv_blocks": {
            "block_size_tokens": BLOCK_SIZE,
            "while_pruning": -(-n // BLOCK_SIZE) + layout.compact_blocks(n, BLOCK_SIZE),
            "after_pruning": layout.held_blocks(n, n + 1, BLOCK_SIZE),
            "seen_in_metrics": outcome.blocks_seen,
            "dense": -(-(n + 1) // BLOCK_SIZE),
        },
        "seconds": {"first_token": outcome.seconds[0], "whole_answer": outcome.seconds[1]},
        "settings": {k: v for k, v in settings.items() if k != "record_kept"},
        "versions": {p: version(p) for p in ("sparsemm-vllm", "vllm", "torch", "transformers")},
        "machine": {"gpu": has_gpu(), "processor": platform.processor() or platform.machine()},
    }


def words_in_order(true: list[str], said: list[str]) -> int:
    """How many of the true words were said, exactly and in order; one left out costs one."""
    matcher = difflib.SequenceMatcher(a=true, b=said, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks())


def _show(report: dict[str, Any], console: Console) -> None:
    blocks, kept = report["kv_blocks"], report["kept_per_head"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "words right": f"{report['words_right']} of {report['words']}",
        "prompt": f"{report['prompt_tokens']} tokens",
        "kept per head": f"{kept['min']} min, {kept['median']:g} median, {kept['max']} max",
        f"KV blocks of {blocks['block_size_tokens']}": (
            f"{blocks['while_pruning']} while pruning, {blocks['after_pruning']} after it; "
            f"dense holds {blocks['dense']}"
        ),
        "time": f"{report['seconds']['first_token']:.2f} s to the first token, "
        f"{report['seconds']['whole_answer']:.2f} s in all",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(Panel(table, title="What the pruned cache held", expand=False))
    seen = blocks["seen_in_metrics"]
    if not report["pruned"]:
        console.print("[yellow]The budget covers the prompt: nothing was pruned.[/]")
    elif seen is None:
        console.print("[dim]No reading of the server's metrics caught the step that pruned.[/]")
    elif seen == (blocks["while_pruning"], blocks["after_pruning"]):
        console.print("[dim]The server's metrics showed the same numbers of blocks.[/]")
    else:
        console.print(f"[yellow]The server's metrics showed {seen[0]}, then {seen[1]} blocks.[/]")


def _save(report: dict[str, Any], sample: Sample, outcome: Outcome, out: Path) -> None:
    from sparsemm_vllm.commands.kept_map import draw_kept_map, image_token_positions

    write_whole(out / "report.json", json.dumps(report, indent=2) + "\n")
    if report["pruned"]:
        kept = load_kept(out / "kept", outcome.request_id)
    else:
        profile = load_profile(READER)
        everything = np.arange(outcome.prompt_tokens - WINDOW)
        kept = {h: everything for h in np.ndindex(profile.num_layers, profile.num_kv_heads)}
    positions = image_token_positions(reader_folder(), sample.question, outcome.prompt_tokens)
    draw_kept_map(sample.image, report, kept, positions, out / "report.png")
