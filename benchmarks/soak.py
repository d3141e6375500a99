"""Do to a server what clients do to servers, and check that it forgets all of it.

    python benchmarks/soak.py http://127.0.0.1:8000 --model sparsemm-reader --pid PID

Clients ask about pictures and without any, stream, hang up, and send unreadable pictures, prompts
that are too long and settings that do not exist. Between them a fixed question is asked. It is
checked that good requests are answered and bad ones refused with status 400, that the fixed
question's answer never changes, and that KV blocks and memory are free again at the end. The last
line is JSON; the exit status is 1 if anything was wrong.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import httpx
import openai
import psutil
import typer
from rich.console import Console

from sparsemm_vllm.commands.client import data_url, metric
from sparsemm_vllm.data.pictures import EVAL_SEEDS, Sample, make_sample

PROBE_EVERY = 20  # requests
WARM_UP = 0.25  # share of the requests after which memory is measured first
PROBE_SEED = EVAL_SEEDS[0]

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@dataclass
class Report:
    """What happened.

    Attributes:
        outcomes: requests by what they were and how they ended.
        failures: events that should not have happened, in words.
        probes: number of times that the fixed question was asked.
        seconds: time that it took.
        rss_mib: resident memory of all processes of the server, warm and at the end.
        blocks_in_use: share of the KV blocks that are in use at the end.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    probes: int = 0
    seconds: float = 0.0
    rss_mib: tuple[float, float] = (0.0, 0.0)
    blocks_in_use: float = 1.0


class Soak:
    """One run against one server.

    Args:
        url: address of the server, without ``/v1``.
        model: its name there.
        pid: process id of the server, to measure its memory; none measures nothing.
        seed: seed of what is asked, and in which order.
    """

    def __init__(self, url: str, model: str, pid: int | None = None, seed: int = 0) -> None:
        self.url, self.model, self.pid = url, model, pid
        self.rng = random.Random(seed)
        self.report = Report()
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
        )
        self._probed: str | None = None

    async def run(self, requests: int, clients: int, seconds: float) -> Report:
        """Ask until so many requests were made or the time is over, then wait until all is quiet.

        Args:
            requests: largest number of requests.
            clients: number of clients that ask at the same time.
            seconds: time after which no request is begun any more.
        """
        begun = time.monotonic()
        await self._ask_many(round(requests * WARM_UP), clients, begun + seconds * WARM_UP)
        await self._wait_until_idle()
        warm = self._rss()
        rest = requests - self.report.outcomes.total()
        await self._ask_many(rest, clients, begun + seconds)
        await self._probe()
        await self._wait_until_idle()
        self.report.seconds = round(time.monotonic() - begun, 1)
        self.report.rss_mib = (warm, self._rss())
        await self._client.close()
        return self.report

    async def _ask_many(self, requests: int, clients: int, deadline: float) -> None:
        left = iter(range(requests))

        async def client() -> None:
            for index in left:
                if time.monotonic() > deadline:
                    return
                if index % PROBE_EVERY == 0:
                    await self._probe()
                await self._one()

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())

    async def _one(self) -> None:
        kinds: list[tuple[int, Callable[[], Awaitable[str]]]] = [
            (4, self._answered),
            (2, self._about_text),
            (2, self._disconnected),
            (1, self._unreadable_picture),
            (1, self._too_long),
            (1, self._unknown_setting),
        ]
        (kind,) = self.rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
        name = kind.__name__.lstrip("_")
        try:
            outcome = await kind()
        except openai.APIError as error:
            self.report.failures.append(f"{name}: {type(error).__name__}: {error}")
            outcome = "failed"
        self.report.outcomes[f"{name}: {outcome}"] += 1

    # What is asked

    async def _answered(self) -> str:
        tokens = self.rng.randint(1, 24)
        answer = await self._create(
            self._sample(), max_tokens=tokens, temperature=self.rng.choice([0, 1.0])
        )
        assert answer.usage.completion_tokens <= tokens
        return "answered"

    async def _about_text(self) -> str:
        words = [self.rng.choice(["what", "is", "this", "about", "2", "7"]) for _ in range(80)]
        text = " ".join(words[: self.rng.randint(1, len(words))])
        await self._create(text, max_tokens=self.rng.randint(1, 12), temperature=0)
        return "answered"

    async def _disconnected(self) -> str:
        stream = await self._create(
            self._sample(), max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        after = self.rng.randint(0, 5)
        async for _ in stream:
            after -= 1
            if after < 0:
                break
        await stream.close()
        return "hung up"

    async def _unreadable_picture(self) -> str:
        return await self._refused(
            [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "text", "text": "Read the text."},
            ]
        )

    async def _too_long(self) -> str:
        return await self._refused("x" * 5000)

    async def _unknown_setting(self) -> str:
        return await self._refused(
            "what?", extra_body={"vllm_xargs": {"sparsemm_budget": -self.rng.randint(1, 9)}}
        )

    async def _refused(self, content: Any, **options: Any) -> str:
        try:
            await self._create(content, max_tokens=4, **options)
        except openai.BadRequestError:
            return "refused"
        self.report.failures.append(f"accepted: {str(content)[:60]!r} {options}")
        return "failed"

    async def _probe(self) -> None:
        answer = await self._create(make_sample(PROBE_SEED), max_tokens=40, temperature=0)
        said = answer.choices[0].message.content
        self._probed = self._probed or said
        self.report.probes += 1
        if said != self._probed:
            self.report.failures.append(f"the probe's answer was {self._probed!r}, is {said!r}")

    def _sample(self) -> Sample:
        return make_sample(EVAL_SEEDS[self.rng.randrange(2000)], self.rng.choice(["read", "query"]))

    async def _create(self, content: Sample | str | list[dict[str, Any]], **options: Any) -> Any:
        if isinstance(content, Sample):
            content = [
                {"type": "image_url", "image_url": {"url": data_url(content.image)}},
                {"type": "text", "text": content.question},
            ]
        messages: Any = [{"role": "user", "content": content}]
        return await self._client.chat.completions.create(
            model=self.model, messages=messages, **options
        )

    # What is left

    async def _wait_until_idle(self, patience: float = 120.0) -> None:
        """Wait until no request runs and no block is in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.monotonic() + patience
        async with httpx.AsyncClient() as client:
            while True:
                text = (await client.get(f"{self.url}/metrics")).text
                busy = {name: metric(text, f"vllm:{name}") for name in names}
                self.report.blocks_in_use = busy["kv_cache_usage_perc"]
                if not any(busy.values()):
                    return
                if time.monotonic() > deadline:
                    self.report.failures.append(f"still busy after {patience:.0f} s: {busy}")
                    return
                await asyncio.sleep(0.5)

    def _rss(self) -> float:
        if self.pid is None:
            return 0.0
        server = psutil.Process(self.pid)
        family = [server, *server.children(recursive=True)]
        return round(sum(process.memory_info().rss for process in family) / 2**20, 1)


@app.command()
def main(
    url: Annotated[str, typer.Argument(help="Of the server, without /v1.")],
    model: Annotated[str, typer.Option(help="Its name there.")] = "sparsemm-reader",
    requests: Annotated[int, typer.Option(help="To make at most.")] = 500,
    clients: Annotated[int, typer.Option(help="That ask at the same time.")] = 16,
    minutes: Annotated[float, typer.Option(help="After which no request is begun.")] = 30.0,
    pid: Annotated[int | None, typer.Option(help="Of the server, to measure its memory.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is asked.")] = 0,
) -> None:
    """Load a server and say what happened."""
    console = Console()
    report = asyncio.run(Soak(url, model, pid, seed).run(requests, clients, 60 * minutes))
    for outcome, count in sorted(report.outcomes.items()):
        console.print(f"{count:6}  {outcome}")
    for failure in report.failures:
        console.print(f"[red]wrong:[/] {failure}", soft_wrap=True)
    console.print(json.dumps(asdict(report)), soft_wrap=True)
    raise typer.Exit(1 if report.failures else 0)


if __name__ == "__main__":
    app()
