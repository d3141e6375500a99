"""What the engine is asked, and what must be true of its answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parent has to start the child before it imports torch
    from sparsemm_vllm.budget.layout import CacheLayout

BLOCK_SIZE, WINDOW, BUDGET, LARGEST_BUDGET = 16, 8, 40, 192  # tokens
STEP_TOKENS = 160  # that a step of the engine may compute
POOL_BLOCKS = 33  # that can hold tokens; vLLM has one more, which never does
MAX_TOKENS = 24  # of an answer; crosses a block's edge after each prompt here, and ends at none


@dataclass(frozen=True)
class Request:
    """One request, the same for the engine and for the reference.

    Attributes:
        text: prompt, with an ``<image>`` for each picture.
        pictures: seeds of the pictures.
        budget: tokens per KV head on average, window included; 0 asks for no pruning.
    """

    text: str
    pictures: tuple[int, ...] = ()
    budget: int = BUDGET

    @property
    def extra_args(self) -> dict[str, int] | None:
        """What the request asks of SPARSEMM; none if it takes the server's budget."""
        if self.budget == BUDGET:
            return None
        return {"sparsemm_budget": self.budget} if self.budget else {"sparsemm": 0}

    def layout(self, server: "CacheLayout") -> "CacheLayout":
        """Budgets of its heads, from those of the server."""
        return server.of_budget(self.budget) if self.budget else server.dense


@dataclass(frozen=True)
class Seen:
    """What was seen while the requests of a case were served.

    Attributes:
        prompt_tokens: length of each prompt, in tokens.
        cached_tokens: tokens of each prompt that came from the prefix cache.
        blocks: KV blocks that all requests held after the steps, repetitions left out.
        preemptions: number of preemptions.
    """

    prompt_tokens: list[int]
    cached_tokens: list[int]
    blocks: list[int]
    preemptions: int


# Looks at what was seen: whether it is as the case wants it, and what it was.
Condition = Callable[[Seen], tuple[bool, str]]


def _whole(seen: Seen) -> tuple[bool, str]:
    n, cached = seen.prompt_tokens[0], seen.cached_tokens[0]
    return n <= STEP_TOKENS and not cached, f"{cached} of {n} cached"


def _chunked(seen: Seen) -> tuple[bool, str]:
    """The last chunk would be smaller than the window if vLLM alone shaped it."""
    n, cached = seen.prompt_tokens[0], seen.cached_tokens[0]
    return STEP_TOKENS < n < STEP_TOKENS + WINDOW and not cached, f"{cached} of {n} cached"


def _cached(seen: Seen) -> tuple[bool, str]:
    n, cached = seen.prompt_tokens[0], seen.cached_tokens[0]
    return 0 < cached <= n - WINDOW, f"{cached} of {n} cached"


def _together(seen: Seen) -> tuple[bool, str]:
    return not seen.preemptions, _preemptions(seen)


def _preempted(seen: Seen) -> tuple[bool, str]:
    return seen.preemptions > 0, _preemptions(seen)


def _preemptions(seen: Seen) -> str:
    return f"preempted {seen.preemptions} times" if seen.preemptions else "not preempted"


@dataclass(frozen=True)
class Case:
    """Requests that are served at once.

    Attributes:
        name: name of the row in the table.
        requests: requests; each answer must equal its reference.
        condition: condition that the way in which it was served must meet.
        keeps_cache: whether the prefix cache of the case before is kept.
    """

    name: str
    requests: tuple[Request, ...]
    condition: Condition
    keeps_cache: bool = False


SHORT = Request("<s>short")
WORDS = Request("<s>Pack my box with five dozen jugs of liquor; how vexingly quick zebras jump!")
PHOTO = Request("<s><image>hello world this is a long prompt", (1,))
LONG = Request("<s><image><image>Another one here of longer 012345", (1, 2))  # chunks of 154 and 8
COVERED = Request(PHOTO.text, PHOTO.pictures, LARGEST_BUDGET)
WHOLE = Request(LONG.text, LONG.pictures, 0)
ROOMY = Request(LONG.text, LONG.pictures, 72)

CASES = (
    Case("within the budget", (COVERED,), _whole),
    Case("pruned, whole", (PHOTO,), _whole),
    Case("pruned, in chunks", (LONG,), _chunked),
    Case("pruned, prefix hit", (LONG,), _cached, keeps_cache=True),
    Case("pruned, own budget", (ROOMY,), _chunked),
    Case("opted out", (WHOLE,), _chunked),
    Case("several at once", (SHORT, PHOTO, LONG, WORDS), _together),
    Case(
        "preempted, resumed",
        (LONG, WHOLE, PHOTO, ROOMY, PHOTO, WHOLE, PHOTO, LONG),
        _preempted,
    ),
)
REFERENCE = "masked reference"
START = "engine start"


def names(dtypes: list[str]) -> list[str]:
    """Names of all rows that a run must have, in their order."""
    own = [START, *(case.name for case in CASES)]
    return [REFERENCE, *(row_name(name, dtype, dtypes) for dtype in dtypes for name in own)]


def row_name(name: str, dtype: str, dtypes: list[str]) -> str:
    """A row's name; says the data type where there are several."""
    return f"{dtype}: {name}" if len(dtypes) > 1 else name


def expected_blocks(layout: "CacheLayout", prompt_tokens: int) -> list[int]:
    """Blocks that one request holds, by the formula, from the step that ends its prompt on.

    Args:
        layout: cache layout of the request.
        prompt_tokens: length of the prompt, in tokens.

    Returns:
        The numbers after each step, repetitions left out; 0 at the end.
    """
    n = prompt_tokens
    peak = -(-n // BLOCK_SIZE) + layout.compact_blocks(n, BLOCK_SIZE)
    after = [layout.held_blocks(n, total, BLOCK_SIZE) for total in range(n + 1, n + MAX_TOKENS)]
    return without_repetitions([peak, *after, 0])


def without_repetitions(numbers: list[int]) -> list[int]:
    """The numbers, those left out that equal the one before."""
    return [b for i, b in enumerate(numbers) if i == 0 or b != numbers[i - 1]]
