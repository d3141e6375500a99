"""A load on a server, by vLLM's own client, and what the server's metrics say meanwhile."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx

from sparsemm_vllm.commands.client import metric, pool_blocks
from sparsemm_vllm.processes import serve_environment
from speed.scenarios import SEED, Load, Scenario

SERVED = "served"  # name of every model
POLL_SECONDS = 0.1
# Of vLLM's result: what is kept, under which name.
KEPT = {
    "duration": "seconds",
    "request_throughput": "requests_per_second",
    "output_throughput": "output_tokens_per_second",
    "total_token_throughput": "total_tokens_per_second",
    "p50_ttft_ms": "ttft_p50_ms",
    "p99_ttft_ms": "ttft_p99_ms",
    "p50_tpot_ms": "tpot_p50_ms",
    "p99_tpot_ms": "tpot_p99_ms",
}


class LoadError(RuntimeError):
    """The load was not done as asked, so there is nothing to report."""


class Bench:
    """`vllm bench serve` in a process that stays: importing vLLM takes longer than a small load.

    Nothing else differs from the command: its parser, its data sets, its client and its results.

    Args:
        log: file for what it prints.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        spawning = multiprocessing.get_context("spawn")  # a fork would inherit our threads
        arguments = (log, serve_environment())
        self._pool = ProcessPoolExecutor(1, spawning, _begin, arguments)

    def run(self, arguments: Sequence[str], timeout: float) -> None:
        """Do what ``vllm bench serve *arguments`` does.

        Args:
            arguments: arguments of the command.
            timeout: time that it may take, in seconds.

        Raises:
            LoadError: if it fails, dies, or is not done in time.
        """
        late = f"vllm bench serve was not done after {timeout:.0f} s: {self.log}"
        try:
            self._pool.submit(_run, list(arguments), timeout).result()
        except BrokenProcessPool as died:
            raise LoadError(f"vllm bench serve died: {self.log}") from died
        except TimeoutError as error:
            raise LoadError(late) from error
        except (Exception, SystemExit) as error:  # argparse exits
            text = "".join(traceback.format_exception(error))
            raise LoadError(f"vllm bench serve failed:\n{text}") from error

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _begin(log: Path, environment: dict[str, str]) -> None:
    """In the other process, before vLLM is imported: its environment, and where its output goes."""
    os.environ.update(environment)
    with log.open("w") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process outlives a parent that is killed, unless it looks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(arguments: list[str], timeout: float) -> None:
    """In the other process: what the command does."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    asyncio.run(asyncio.wait_for(main_async(parser.parse_args(arguments)), timeout))


@contextlib.contextmanager
def watch(url: str, seconds: float = POLL_SECONDS) -> Iterator["Watch"]:
    """Read a server's `/metrics` every so many seconds, while a load runs on it.

    What passes between two readings is missed: the blocks of a prompt that is then pruned show for
    a single step, so under light load the peak depends on luck.
    """
    over = threading.Event()
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(1) as pool:

        def read() -> str:
            return client.get(f"{url}/metrics").raise_for_status().text

        found = Watch(read())
        polling = pool.submit(found.poll, read, over, seconds)
        try:
            yield found
        finally:
            over.set()
        polling.result()  # raises what the thread has met
        found.after = read()


@dataclass
class Watch:
    """What `/metrics` said.

    Attributes:
        before: page before the load.
        after: page after it.
        running: running requests, of the readings in which any ran.
        usage: share of the KV blocks in use, of the same readings.
    """

    before: str
    after: str = ""
    running: list[float] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)

    def poll(self, read: Callable[[], str], over: threading.Event, seconds: float) -> None:
        """Add a reading every so many seconds, until it is over."""
        while not over.wait(seconds):
            page = read()
            if running := metric(page, "vllm:num_requests_running"):
                self.running.append(running)
                self.usage.append(metric(page, "vllm:kv_cache_usage_perc"))

    @property
    def readings(self) -> dict[str, float]:
        """Requests that ran and the share of KV blocks in use: peaks, and means while any ran."""
        running, usage = self.running or [0.0], self.usage or [0.0]
        return {
            "running_requests_peak": int(max(running)),
            "running_requests_mean": round(fmean(running), 2),
            "kv_usage_peak_share": round(max(usage), 4),
            "kv_usage_mean_share": round(fmean(usage), 4),
        }

    def counted(self, name: str, **labels: str) -> int:
        """By how much a counter grew."""
        before, after = (metric(page, name, **labels) for page in (self.before, self.after))
        return int(after - before)

    @property
    def pruned(self) -> int:
        """How many prompts were pruned; a dense server has no such counter."""
        name = "sparsemm:requests_total"
        return self.counted(name, outcome="pruned") if name in self.after else 0

    @property
    def blocks(self) -> int:
        """KV blocks of the server's pool."""
        return pool_blocks(self.after)


def arguments(
    url: str, tokenizer: Path, requests: Path, scenario: Scenario, load: Load, result: Path
) -> list[str]:
    """Arguments of `vllm bench serve`.

    The data set is ``custom_image``, not ``random-mm``: we say which requests share a picture, and
    both servers are asked the same. There are no warm-up requests of its own, since it takes the
    first of the measured ones for that, which would then be cached.
    """
    options = {
        "backend": "openai-chat",
        "base-url": url,
        "endpoint": "/v1/chat/completions",
        "model": str(tokenizer),
        "served-model-name": SERVED,
        "dataset-name": "custom_image",
        "dataset-path": str(requests),
        "custom-output-len": str(scenario.output_tokens),
        "num-prompts": str(load.requests),
        "request-rate": str(load.rate),
        "seed": str(SEED),
        "temperature": "0",
        "percentile-metrics": "ttft,tpot",
        "metric-percentiles": "50,99",
        "result-dir": str(result.parent),
        "result-filename": result.name,
    }
    pairs = [word for name, value in options.items() for word in (f"--{name}", value)]
    switches = ("enable-multimodal-chat", "disable-shuffle", "ignore-eos", "save-result")
    return [*pairs, *(f"--{name}" for name in (*switches, "disable-tqdm"))]


def numbers(result: dict[str, Any], scenario: Scenario, load: Load) -> dict[str, float]:
    """What is kept of the JSON that `vllm bench serve` saves.

    Raises:
        LoadError: if a request failed or an answer was shorter than asked.
    """
    if result["failed"] or result["completed"] != load.requests:
        raise LoadError(f"{result['failed']} of {load.requests} requests failed")
    asked = load.requests * scenario.output_tokens
    if result["total_output_tokens"] != asked:
        raise LoadError(f"{result['total_output_tokens']} tokens were answered, not {asked}")
    kept = {name: round(float(result[key]), 4) for key, name in KEPT.items()}
    prompt = round(result["total_input_tokens"] / load.requests, 1)
    sizes = {"requests": load.requests, "output_tokens": scenario.output_tokens}
    return {"prompt_tokens_mean": prompt, **sizes, **kept}


def put_load(
    bench: Bench, url: str, tokenizer: Path, requests: Path, scenario: Scenario, load: Load
) -> dict[str, float]:
    """Put a load on a server whose caches are empty.

    Args:
        bench: client that asks.
        url: address of the server.
        tokenizer: folder of the model.
        requests: file of `write_requests`; the result goes to the same folder.
        scenario: kind of the requests.
        load: number and rate of the requests.

    Returns:
        A cell: numbers, with their units in their names.

    Raises:
        LoadError: if it was not done as asked.
    """
    result = requests.with_name("result.json")
    words = arguments(url, tokenizer, requests, scenario, load, result)
    with watch(url) as found:
        bench.run(words, timeout=1800)
    return numbers(json.loads(result.read_text()), scenario, load) | {
        **found.readings,
        "kv_blocks": found.blocks,
        "preemptions": found.counted("vllm:num_preemptions_total"),
        "prefix_hit_tokens": found.counted("vllm:prefix_cache_hits_total"),
        "pruned_requests": found.pruned,
    }
