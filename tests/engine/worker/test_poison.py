"""Blocks that are poisoned and tagged, without an engine."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sparsemm_vllm.engine.worker.probes.holders import Holder, block_contents
from sparsemm_vllm.engine.worker.probes.knockout import Knockout, attend_without
from sparsemm_vllm.engine.worker.probes.poison import Poison
from sparsemm_vllm.engine.worker.probes.watched_cache import PoisonError, number_slots

L, B, H, P, D, W = 2, 12, 3, 4, 8, 3
N = 9  # prompt tokens: two blocks and a part of one
FP8 = torch.float8_e4m3fn
TOKENS = list(range(100, 120))


def make_cache(dtype: torch.dtype = torch.float32, heads_first: bool = True) -> torch.Tensor:
    """A cache of zeros as vLLM lays it out: between other layers' memory, in either order."""
    shape = (L, B, H, P, 2 * D) if heads_first else (L, B, P, H, 2 * D)
    layers, *rest = shape
    memory = torch.zeros(2 * layers, *rest, dtype=torch.float32).to(dtype)
    cache = memory[1::2]
    return cache if heads_first else cache.transpose(2, 3)


class Steps:
    """Drives a `Poison` as the model state does.

    Args:
        cache: as in `Poison`.
    """

    def __init__(self, cache: torch.Tensor) -> None:
        self.cache = cache
        self.poison = Poison(cache, W, max_tokens=32)
        self.rows: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}
        self.requests: dict[int, tuple[int, int]] = {}

    def add(
        self,
        index: int,
        blocks: Sequence[int],
        n: int = N,
        C: int = 0,
        hit: int = 0,
        tokens: Sequence[int] = TOKENS,
    ) -> None:
        contents = block_contents(tokens[:n], [], "", P)
        holder = Holder(f"r{index}", n, C, hit, contents, list(blocks))
        self.poison.add(index, holder)
        self.rows[index], self.done[index] = list(blocks), hit
        self.requests[index] = n, C

    def run(
        self,
        counts: dict[int, int],
        new: dict[int, list[int]] | None = None,
        prunes: Sequence[int] = (),
        shift: int = 0,
    ) -> None:
        """A step of so many tokens of each request; all layers write theirs.

        Args:
            counts: tokens of each request, by its index.
            new: blocks that requests get for it.
            prunes: indices of requests whose prompts it prunes.
            shift: error in the entry of each slot.
        """
        for index, blocks in (new or {}).items():
            self.rows[index] += blocks
        table = torch.zeros(len(counts), 8, dtype=torch.int32)
        sizes = np.zeros(max(self.rows) + 1, dtype=np.int64)
        slots, positions = [], []
        for row, (index, count) in enumerate(counts.items()):
            blocks = self.rows[index]
            sizes[index] = len(blocks)
            table[row, : len(blocks)] = torch.tensor(blocks)
            n, C = self.requests[index]
            for position in range(self.done[index], self.done[index] + count):
                entry = position // P
                entry = entry if entry < -(-n // P) else entry + C + shift
                positions.append(position)
                slots.append(blocks[entry] * P + position % P)
            self.done[index] += count
        self.table = table
        self.poison.begin_step(
            np.array(list(counts)),
            np.cumsum([0, *counts.values()]),
            {row for row, index in enumerate(counts) if index in prunes},
            torch.tensor(positions),
            torch.tensor(slots),
            table,
            sizes,
        )
        places = torch.tensor(slots)
        self.cache[:, places // P, :, places % P] = 1.0

    def read(self, row: int, entries: Sequence[int], tokens: Sequence[int], layer: int = 0) -> None:
        """Read one head's slots through the block table, as the torch twins do."""
        with self.poison.watch(layer, self.table):
            blocks = self.table[row][torch.tensor(entries)].long()
            self.cache[layer][blocks, 1, torch.tensor(tokens)].float()

    def keep(self, row: int, entry: int, tokens: Sequence[int]) -> None:
        """Copy a request's first token to slots of a head page."""
        with self.poison.watch(0, self.table):
            blocks = self.table[row]
            slots = torch.tensor(tokens)
            self.cache[1, blocks[entry].long(), 2, slots] = self.cache[0, blocks[0].long(), 2, 0]

    def nan(self, block: int) -> torch.Tensor:
        """Which of a block's slots are NaN in all layers, heads and elements; none in parts."""
        is_nan = self.cache[:, block].float().isnan()
        slots = is_nan.all(-1).all(0).all(0)
        assert torch.equal(slots, is_nan.any(-1).any(0).any(0))
        return slots


@pytest.fixture
def steps() -> Steps:
    return Steps(make_cache())


def pruned(steps: Steps) -> Steps:
    """One request whose prompt was pruned: a compact block with two tokens of a head."""
    steps.add(0, [5, 6, 7, 8], C=1)
    steps.run({0: N}, prunes=[0])
    steps.keep(0, 3, [0, 1])
    steps.run({0: 1})
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("heads_first", [True, False])
def test_blocks_are_filled_when_they_are_given(dtype: torch.dtype, heads_first: bool) -> None:
    cache = make_cache(dtype, heads_first)
    between = torch.as_strided(cache, cache.shape, cache.stride(), 0)
    assert not between.float().isnan().any()
    steps = Steps(cache)
    assert cache.float().isnan().all()
    assert not between.float().isnan().any(), "other layers' memory is not ours"
    steps.add(0, [5, 6, 7])
    steps.run({0: N})
    assert [steps.nan(block).tolist() for block in (5, 7)] == [[False] * P, [False] + [True] * 3]
    steps.poison.remove("r0")
    assert not steps.nan(5).any(), "it may still be cached"
    steps.add(1, [5])
    steps.run({1: 1})
    assert steps.nan(5).tolist() == [False, True, True, True]


@pytest.mark.parametrize("heads_first", [True, False])
def test_slots_are_numbered_where_they_lie(heads_first: bool) -> None:
    cache = make_cache(heads_first=heads_first)[:, 2:]
    strides = [stride // (2 * D) for stride in cache.stride()[:4]]
    slots = number_slots(cache).as_strided(cache.shape[:4], strides, cache.storage_offset() // 16)
    assert torch.equal(slots.flatten(), torch.arange(cache[..., 0].numel()))


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
@pytest.mark.parametrize("heads_first", [True, False])
def test_what_is_written_may_be_read(dtype: torch.dtype, heads_first: bool) -> None:
    steps = pruned(Steps(make_cache(dtype, heads_first)))
    steps.read(0, [1, 1, 2, 2], [2, 3, 0, 1])  # from n - W = 6 on
    with steps.poison.watch(0, steps.table):
        row = steps.table[0]
        raw = steps.cache.view(torch.uint8) if dtype == FP8 else steps.cache
        assert raw[1, row[3].long(), 2, :2].clone().shape == (2, 2 * D)


def test_each_read_is_checked(steps: Steps) -> None:
    pruned(steps)
    for entries, tokens, layer, error in (
        ([2, 2], [1, 2], 0, "position 10, .* holds nothing there yet"),
        ([1], [1], 0, "position 5, .* held a pruned token"),
        ([3], [2], 0, "entry 3 of its row, layer slot 0, .* holds NaN there"),
        ([7], [0], 0, r"block 0 \(of nobody, generation 0\) is not one of its blocks"),
    ):
        with pytest.raises(PoisonError, match=error):
            steps.read(0, entries, tokens, layer)
    with steps.poison.watch(1, steps.table):
        block = steps.table[0][2].long()
        with pytest.raises(PoisonError, match="another layer's place"):
            steps.cache[0][block, :, 0].clone()


def test_any_operation_reads(steps: Steps) -> None:
    pruned(steps)
    with steps.poison.watch(0, steps.table):
        page = steps.cache[0, int(steps.table[0][2]), 1]
        assert page.shape == (P, 2 * D), "a view reads nothing"
        with pytest.raises(PoisonError, match="holds nothing there yet"):
            page.sum()


def test_a_read_without_the_block_table(steps: Steps) -> None:
    pruned(steps)
    with (
        steps.poison.watch(0, steps.table),
        pytest.raises(PoisonError, match="without the block table"),
    ):
        steps.cache[0, 7, 1, 0].sum()


def test_keys_of_a_knockout(steps: Steps) -> None:
    """It reads the window and what follows it, and not all of their blocks."""
    steps.add(0, [5, 6, 7])
    steps.run({0: N})
    query, output = torch.ones(N, 2 * H, D), torch.zeros(N, 2 * H, D)
    with steps.poison.watch(1, steps.table):
        attend_without(query, steps.cache[1], steps.table, Knockout(1, 2, 0, 7, 7, 2, 6), output, 1)
    assert output[7:, 4:].eq(1).all()


def test_compact_blocks_before_the_prune(steps: Steps) -> None:
    steps.add(0, [5, 6, 7, 8], C=1)
    steps.run({0: N}, prunes=[0])
    with pytest.raises(PoisonError, match="nothing is pruned yet"):
        steps.read(0, [3], [0])


def test_kept_tokens_go_to_free_slots_of_compact_blocks(steps: Steps) -> None:
    steps.add(0, [5, 6, 7, 8], C=1)
    steps.run({0: N}, prunes=[0])
    steps.keep(0, 3, [0, 1])
    with pytest.raises(PoisonError, match=r"keeps a token .* holds a kept token there already"):
        steps.keep(0, 3, [2, 1])
    with pytest.raises(PoisonError, match=r"slot 3: .* holds a kept token there already"):
        steps.keep(0, 3, [2, 3, 3])
    with pytest.raises(PoisonError, match="not one of its compact blocks"):
        steps.keep(0, 2, [3])
    with pytest.raises(PoisonError, match=r"block 0 .* not one of its compact blocks"):
        steps.keep(0, 4, [0])


def test_slots_of_generated_tokens(steps: Steps) -> None:
    steps.add(0, [5, 6, 7, 8], C=1)
    steps.run({0: N}, prunes=[0])
    steps.run({0: 3})  # the last prompt block
    with pytest.raises(PoisonError, match=r"writes position 12, slot 0: block 8 .* compact block"):
        steps.run({0: 1}, new={0: [9]}, shift=-1)


def test_a_prompt_token_is_written_once(steps: Steps) -> None:
    steps.add(0, [5, 6, 7])
    steps.run({0: N})
    steps.run({0: 2})
    steps.done[0] -= 1  # a rejected draft
    steps.run({0: 1})
    steps.done[0] = N - 1
    with pytest.raises(PoisonError, match=r"writes position 8, .* holds a prompt token already"):
        steps.run({0: 1})


def test_a_block_that_is_given_twice(steps: Steps) -> None:
    steps.add(0, [5, 6, 7, 8], C=1)
    steps.run({0: N}, prunes=[0])
    steps.add(1, [5], n=2)
    steps.run({0: 1, 1: 2})  # the older blocks were freed by the prune
    assert steps.poison._generation[5] == 2
    with pytest.raises(PoisonError, match=r"block 5 \(of r1, generation 2\) was given to another"):
        steps.read(0, [0], [0])
    steps.add(2, [6], n=2)
    with pytest.raises(PoisonError, match=r"request r2: block 6 .* given to it while r0 holds it"):
        steps.run({2: 2})


def test_a_freed_block_comes_back_to_its_request(steps: Steps) -> None:
    pruned(steps)
    steps.run({0: 2})
    steps.run({0: 1}, new={0: [5]})
    steps.read(0, [4], [0])
    with pytest.raises(PoisonError, match=r"block 6 .* is entry 1 and 5 of its row"):
        steps.run({0: 4}, new={0: [6]})


def test_prefix_hits(steps: Steps) -> None:
    steps.add(0, [5, 6, 7, 8], C=1)
    steps.add(1, [5, 6, 9], hit=8)
    steps.run({1: 1, 0: N}, prunes=[0])  # hit in the very step that computes them
    steps.read(0, [0, 1, 2], [0, 3, 0])
    steps.poison.remove("r0")
    steps.poison.remove("r1")
    steps.add(0, [5, 6, 10], hit=8)  # of what nobody holds
    steps.run({0: 1})
    assert (steps.poison._held_by[[5, 6, 7]] == [1, 1, 0]).all()


@pytest.mark.parametrize(
    ("blocks", "hit", "tokens", "error"),
    [
        ([3, 9], 4, TOKENS, "was never computed"),
        ([7, 9], 4, TOKENS, "was never computed"),
        ([5, 6, 9], 8, [*TOKENS[:6], 1, *TOKENS[7:]], "block 6 .* holds other tokens"),
        ([5, 9], 4, TOKENS[1:], "holds other tokens"),
    ],
)
def test_prefix_hits_of_something_else(
    steps: Steps, blocks: list[int], hit: int, tokens: list[int], error: str
) -> None:
    steps.add(0, [5, 6, 7, 8], C=1)
    steps.run({0: N}, prunes=[0])
    steps.add(1, blocks, hit=hit, tokens=tokens)
    with pytest.raises(PoisonError, match=error):
        steps.run({1: 1})


def test_answers_are_shared_only_if_the_prompt_was_whole(steps: Steps) -> None:
    """The block that holds the prompt's end and tokens that were generated."""
    steps.add(0, [5, 6, 7])
    steps.run({0: N})
    steps.run({0: 3})
    steps.add(1, [5, 6, 7, 9], n=14, hit=12)
    steps.run({1: 1})

    steps = pruned(Steps(make_cache()))
    steps.run({0: 2})
    steps.add(1, [5, 6, 7, 9], n=14, hit=12)
    with pytest.raises(PoisonError, match=r"block 7 .* is a prefix hit, and no prompt's"):
        steps.run({1: 1})


def test_a_hit_that_ends_inside_a_block(steps: Steps) -> None:
    """vLLM copies the block before the step; what follows the hit is poisoned."""
    steps.add(0, [5, 7])
    steps.run({0: 8})
    steps.cache[:, 6] = steps.cache[:, 7]
    steps.add(1, [5, 6], n=8, hit=6)
    steps.run({1: 1})
    steps.read(0, [1, 1, 1], [0, 1, 2])
    assert steps.nan(6).tolist() == [False, False, False, True]


def test_a_prefix_hit_is_not_written(steps: Steps) -> None:
    steps.add(0, [5, 6, 7])
    steps.run({0: N})
    steps.add(1, [5, 6, 9], hit=8)
    steps.done[1] = 7
    with pytest.raises(PoisonError, match=r"writes position 7, .* nobody may write"):
        steps.run({1: 1})


def test_too_few_blocks_in_the_step_that_prunes(steps: Steps) -> None:
    steps.add(0, [5, 6, 7], C=1)
    with pytest.raises(PoisonError, match=r"has 3 blocks in the step .* 9 tokens, and needs 4"):
        steps.run({0: N}, prunes=[0])


def test_attention_that_is_nan(steps: Steps) -> None:
    steps.add(0, [5, 6, 7])
    steps.add(1, [8], n=3)
    steps.run({0: N, 1: 2})
    output = torch.zeros(16, 4, D)
    output[N + 2 :] = torch.nan  # padding
    steps.poison.check_output(0, output)
    output[N + 1, 3, 0] = torch.nan
    error = r"request r1, position 1, is NaN in layer 1: .* blocks are 8 \(generation 1\)"
    with pytest.raises(PoisonError, match=error):
        steps.poison.check_output(1, output)
    steps.run({0: 1})
    steps.poison.check_output(1, torch.zeros(1, 4, D))


@pytest.mark.parametrize("next_step", [False, True])
def test_on_a_device_attention_is_looked_at_when_the_step_has_run(
    steps: Steps, next_step: bool
) -> None:
    """Layers only note it, so that a CUDA graph can; as good as on a device."""
    steps.poison._slots = None
    steps.add(0, [5, 6, 7])
    steps.add(1, [8], n=3)
    steps.run({0: N, 1: 2})
    steps.poison.end_step()
    output = torch.zeros(16, 4, D)
    output[2] = torch.nan
    steps.poison.check_output(1, output)
    steps.poison.check_output(0, torch.zeros(16, 4, D))
    with pytest.raises(PoisonError, match="request r0, position 2, is NaN in layer 1"):
        steps.run({0: 1}) if next_step else steps.poison.end_step()
    steps.poison.end_step()


def test_contents_of_blocks() -> None:
    tokens, pictures = [1] * 11, [(2, 4, "a")]
    plain = block_contents(tokens, [], "", P)
    assert len(plain) == 2
    assert plain == block_contents([1] * 8, [], "", P)
    shown = block_contents(tokens, pictures, "", P)
    other = block_contents(tokens, [(2, 4, "b")], "", P)
    assert len({*plain, *shown, *other, *block_contents(tokens, [], "lora", P)}) == 8
    later = block_contents([*tokens[:4], 2, *tokens[5:]], pictures, "", P)
    assert [a == b for a, b in zip(shown, later, strict=True)] == [True, False]
