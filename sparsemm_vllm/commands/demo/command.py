"""`sparsemm demo`: what the command does and says."""

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
from typing_extensions import override

from sparsemm_vllm.budget.plan import make_plan
from sparsemm_vllm.budget.profile import load_profile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.commands.client import data_url, metric, png, pool_blocks
from sparsemm_vllm.commands.demo.figure import draw_report
from sparsemm_vllm.commands.kept_map import KeptPicture
from sparsemm_vllm.commands.server import STAGES, Server, ServerError
from sparsemm_vllm.data.pictures import DEMO_SEEDS, Sample, make_demo_sample
from sparsemm_vllm.engine.worker.probes.kept import load_kept
from sparsemm_vllm.environment import has_gpu
from sparsemm_vllm.files import write_whole
from sparsemm_vllm.names import KEY
from sparsemm_vllm.processes import ended_by_signals
from sparsemm_vllm.reader import READER, reader_folder

BLOCK_SIZE = 16
WINDOW = 16
MAX_TOKENS = 64
KEPT = "kept"  # folder in which the workers record what heads keep
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Outcome:
    """What was seen of one request.

    Attributes:
        answer: text that the model said.
        request_id: name of the request in the API.
        prompt_tokens: length of the prompt in tokens, as the server counted it.
        seconds: time to the first token, and to the last, in seconds.
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
        seed: number of the picture; random if none.
        budget: tokens per KV head on average, window included.

    Returns:
        The exit code: 0, or 1 if the server failed, or 130 after Ctrl-C.

    Raises:
        SettingsError: for a budget that a server would refuse.
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
    settings = _settings(budget, out / KEPT)
    try:
        outcome = _serve(sample, settings, out / "server.log", console)
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


def _settings(budget: int, kept: Path) -> Settings:
    values = {"profile": READER, "budget": budget, "window": WINDOW}
    return Settings.from_values(values | {"record_kept": str(kept.resolve())})


def _serve(sample: Sample, settings: Settings, log: Path, console: Console) -> Outcome:
    """Start a server, ask it about the picture, and stop it."""
    server = Server(str(reader_folder()), _arguments(settings), log, OFFLINE)
    with ended_by_signals(), server:
        _wait(server, console)
        return _ask(server, sample, console)


def _arguments(settings: Settings) -> list[str]:
    arguments = {
        "--attention-backend": "SPARSEMM",
        "--served-model-name": READER,
        "--dtype": "bfloat16" if has_gpu() else "float32",
        "--max-model-len": "1024",
        "--max-num-seqs": "8",
        "--block-size": str(BLOCK_SIZE),
        "--kv-cache-memory-bytes": str(64 << 20),
        "--additional-config": json.dumps({KEY: settings.as_values()}),
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

    @override
    def run(self) -> None:
        """Read until `stop` is called, or the server is gone."""
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


def _report(sample: Sample, outcome: Outcome, settings: Settings, seed: int) -> dict[str, Any]:
    """What is written as JSON and shown.

    Args:
        sample: picture with its question and true text.
        outcome: observations of the request.
        settings: settings of the server.
        seed: number of the picture.
    """
    n, first_token = outcome.prompt_tokens, 1
    plan = make_plan(
        load_profile(READER), settings, n, answer_tokens=first_token, block_size=BLOCK_SIZE
    )
    true, said = sample.answer.split(), outcome.answer.split()
    return {
        "seed": seed,
        "question": sample.question,
        "true_text": sample.answer,
        "answer": outcome.answer,
        "words": len(true),
        "words_right": words_in_order(true, said),
        "prompt_tokens": plan.prompt_tokens,
        "pruned": plan.pruned,
        "kept_per_head": {"min": plan.kept_min, "median": plan.kept_median, "max": plan.kept_max},
        "kv_blocks": {
            "block_size_tokens": plan.block_size,
            "while_pruning": plan.peak_blocks,
            "after_pruning": plan.pruned_blocks,
            "seen_in_metrics": outcome.blocks_seen,
            "dense": plan.dense_blocks,
        },
        "seconds": {"first_token": outcome.seconds[0], "whole_answer": outcome.seconds[1]},
        "settings": {k: v for k, v in settings.as_values().items() if k != "record_kept"},
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
    write_whole(out / "report.json", json.dumps(report, indent=2) + "\n")
    picture = _kept_picture(sample, outcome, out / KEPT if report["pruned"] else None)
    draw_report(report, picture, out / "report.png")


def _kept_picture(sample: Sample, outcome: Outcome, kept: Path | None) -> KeptPicture:
    """The picture in its prompt, with what the workers recorded.

    Args:
        sample: picture with its question.
        outcome: observations of the request.
        kept: folder of the records; none if nothing was pruned: then every head kept everything.
    """
    from sparsemm_vllm.commands.demo.prompt import picture_in_prompt  # imports transformers

    n = outcome.prompt_tokens
    geometry, positions = picture_in_prompt(reader_folder(), sample.image, sample.question, n)
    if kept is not None:
        by_head = load_kept(kept, outcome.request_id)
    else:
        profile = load_profile(READER)
        heads = np.ndindex(profile.num_layers, profile.num_kv_heads)
        by_head = dict.fromkeys(heads, np.arange(n - WINDOW))
    return KeptPicture(sample.image, geometry, positions, n, WINDOW, by_head)
