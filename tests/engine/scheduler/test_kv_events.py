"""KV events: what a router learns of the prefix cache is what the prefix cache can serve."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
)
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from support.engines import BLOCK, WINDOW, Engine, settings
from support.simulation.engine import Simulation
from support.simulation.scenario import DRAFTS, Scenario
from support.simulation.traffic import AHEAD

DENSE = {"sparsemm": 0}


@dataclass
class Router:
    """Follows a server's events, as a router would that sends prompts where they are cached.

    Attributes:
        blocks: copies of each block that the server has, by hash.
        children: hash of a block, by the hash of the block before it and its own tokens.
        removed: blocks that were taken back.
    """

    blocks: Counter[Any] = field(default_factory=Counter)
    children: dict[tuple[Any, tuple[int, ...]], Any] = field(default_factory=dict)
    removed: int = 0

    def publish(self, batch: Any) -> None:
        """Take a batch; the name is that of vLLM's publishers, in whose place it can stand."""
        for event in batch.events:
            match event:
                case BlockStored():
                    assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                    parent = event.parent_block_hash
                    for i, block in enumerate(event.block_hashes):
                        tokens = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
                        self.children[parent, tuple(tokens)] = block
                        self.blocks[block] += 1
                        parent = block
                case BlockRemoved():
                    self.blocks.subtract(event.block_hashes)
                    self.removed += len(event.block_hashes)
                case AllBlocksCleared():
                    self.blocks.clear()
        assert min(self.blocks.values(), default=0) >= 0, "removed what was never stored"
        self.blocks += Counter()  # without those of which none is left

    def shutdown(self) -> None:
        """As vLLM's publishers; there is nothing to close."""

    def cached(self, prompt: list[int]) -> int:
        """Tokens at a prompt's beginning that the server has."""
        parent = None
        for start in range(0, len(prompt), BLOCK):
            block = self.children.get((parent, tuple(prompt[start : start + BLOCK])))
            if not self.blocks[block]:
                return start
            parent = block
        return len(prompt)


def cached_blocks(pool: Any) -> Counter[Any]:
    """Copies of each block that the prefix cache can serve, by hash."""
    hashes = [block.block_hash for block in pool.blocks if block.block_hash is not None]
    assert all(pool.get_cached_block(get_block_hash(h), [0]) for h in hashes)
    return Counter(maybe_convert_block_hash(get_block_hash(h)) for h in hashes)


class Watched(Simulation):
    """An engine core with a router that must know everything after every step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.router = self.scheduler.kv_event_publisher = Router()

    def deliver(self, outputs: Any) -> None:
        super().deliver(outputs)
        if not outputs:  # a step was sent, none was processed
            return
        assert self.router.blocks == cached_blocks(self.pool)
        self.seen["copies"] += max(self.router.blocks.values(), default=0) > 1


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(events=True),
        Scenario(events=True, asynchronous=True, queue=AHEAD, drafts=DRAFTS),
    ],
    ids=["sync", "async"],
)
def test_a_router_knows_every_cached_block(scenario: Scenario) -> None:
    """Pruned, preempted, aborted: events are those of the prefix cache, copy by copy."""
    simulation = Watched(7, scenario)
    simulation.run(600)
    router, scheduler = simulation.router, simulation.scheduler
    assert router.removed > 100
    assert simulation.seen["copies"] > 10, "a window that is computed anew is stored a second time"
    assert simulation.seen["hits"] > 20
    assert scheduler.reset_prefix_cache()
    router.publish(KVEventBatch(0, scheduler.kv_cache_manager.take_events()))
    assert not router.blocks


@dataclass
class Subscriber:
    """A router at the other end of a socket."""

    socket: zmq.Socket[bytes]
    endpoint: str
    router: Router = field(default_factory=Router)
    seen: int = 0

    def read(self) -> None:
        """Take what the server has published."""
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        while self.socket.poll(500):
            _, sequence, payload = self.socket.recv_multipart()
            assert int.from_bytes(sequence) == self.seen, "a batch was lost"
            self.seen += 1
            self.router.publish(decoder.decode(payload))


@pytest.fixture
def subscriber() -> Iterator[Subscriber]:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe(b"")
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield Subscriber(socket, f"tcp://127.0.0.1:{port}")


@pytest.mark.engine
def test_a_router_foresees_every_prefix_hit(
    model: Path, tmp_path: Path, subscriber: Subscriber
) -> None:
    """Of chats that go on, in a pool in which old ones are evicted; then everything is cleared."""
    events = KVEventsConfig(enable_kv_cache_events=True, endpoint=subscriber.endpoint)
    engine = Engine(
        model,
        settings(40, tmp_path),
        kv_events_config=events,
        num_gpu_blocks_override=40,
        max_model_len=512,
    )
    router, hits = subscriber.router, []

    def ask(prompt: list[int], extra_args: dict[str, Any] | None = None) -> list[int]:
        subscriber.read()
        window = 1 if extra_args == DENSE else WINDOW
        foreseen = min(router.cached(prompt), (len(prompt) - window) // BLOCK * BLOCK)
        (answer,) = engine.generate(
            {"prompt_token_ids": prompt}, max_tokens=2 * BLOCK, extra_args=extra_args
        )
        assert answer.cached_tokens == foreseen
        hits.append(foreseen)
        return [*prompt, *answer.tokens]

    first = [5 + i % 90 for i in range(100)]
    chat = ask(first)
    subscriber.read()
    assert router.cached(chat) == 96, "the answer to a pruned prompt is no one's prefix"
    ask(first)
    chat = ask([*chat, *range(20, 60)])
    ask(chat, DENSE)
    other = ask([7, 8, 9] * 60, DENSE)
    subscriber.read()
    assert router.cached(other) > 180, "a dense answer is a prefix of the next turn"
    ask([*other, *range(20, 60)])
    ask([7, *range(20, 100)] * 4)  # needs most of the pool
    ask(first)
    subscriber.read()
    before = router.blocks.copy()
    ask(first, {"kv_cache_report_mode": "full"})
    subscriber.read()
    hit, anew = hits[-1] // BLOCK, len(first) // BLOCK - hits[-1] // BLOCK
    assert sum((router.blocks - before).values()) == hit + anew, "reported: hits, and the window"
    assert {0, 80, 96} <= set(hits), hits
    assert router.removed > 0
    engine.rest()
    ask([1, 2, 3] * 9)  # events of a reset go out with the next step
    subscriber.read()
    assert not router.cached(first)
