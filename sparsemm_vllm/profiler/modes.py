"""What the model is made to say while its attention is recorded."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.profiler.words import Place, places_anywhere, places_in_answer

MARGIN = 8  # tokens that the end of a chat prompt may merge with an answer, generously


class Mode(Protocol):
    """How a sample becomes a request, and which of its tokens are scored.

    The queries that predict the scored tokens are the last `prompt_queries` of the prompt and those
    of all generated tokens but the last.
    """

    @property
    def name(self) -> Literal["forced", "free", "causal"]:
        """The name of the mode."""

    @property
    def answers(self) -> str:
        """Where the answers come from, in words, for a profile's provenance."""

    @property
    def continues_answer(self) -> bool:
        """Whether the true answer stands in the prompt."""

    def prompt_queries(self, answer_tokens: int) -> int:
        """Queries of the prompt to record, for a true answer of that many tokens."""

    def max_tokens(self, answer_tokens: int) -> int:
        """Tokens to generate at most."""

    def scored(self, prompt: Sequence[int], generated: Sequence[int], queries: int) -> list[int]:
        """The tokens that the recorded queries predict, in their order."""

    def places(self, text: str, sample: Sample) -> list[Place]:
        """Words in the text of the scored tokens."""


class Forced:
    """The true answer stands in the prompt: one prefill scores all of it, nothing is decoded."""

    name: Literal["forced", "causal"] = "forced"
    answers = "the true ones, as parts of the prompts"
    continues_answer = True

    def prompt_queries(self, answer_tokens: int) -> int:
        """See `Mode`."""
        return answer_tokens + MARGIN

    def max_tokens(self, answer_tokens: int) -> int:
        """See `Mode`."""
        return 1

    def scored(self, prompt: Sequence[int], generated: Sequence[int], queries: int) -> list[int]:
        """See `Mode`; the generated token is no part of the answer."""
        return list(prompt[len(prompt) - queries + 1 :])

    def places(self, text: str, sample: Sample) -> list[Place]:
        """See `Mode`."""
        return places_in_answer(text, sample)


class Causal(Forced):
    """The true answer stands in the prompt, and heads are knocked out one by one."""

    name: Literal["forced", "causal"] = "causal"


class Free:
    """The model answers by itself, greedily, as in the paper.

    A token counts if it belongs to exactly one word of the picture: not if the word stands there
    twice. Source: SparseMM (ICCV 2025), section 3.
    """

    name: Literal["free"] = "free"
    answers = "the model's own, decoded greedily"
    continues_answer = False

    def prompt_queries(self, answer_tokens: int) -> int:
        """See `Mode`; the last one predicts the first token of the answer."""
        return 1

    def max_tokens(self, answer_tokens: int) -> int:
        """See `Mode`; what goes on for longer is no answer."""
        return 2 * answer_tokens + 16

    def scored(self, prompt: Sequence[int], generated: Sequence[int], queries: int) -> list[int]:
        """See `Mode`."""
        return list(generated)

    def places(self, text: str, sample: Sample) -> list[Place]:
        """See `Mode`."""
        return places_anywhere(text, sample)


MODES: dict[str, Mode] = {mode.name: mode for mode in (Forced(), Free(), Causal())}


def messages(sample: Sample, mode: Mode) -> list[Any]:
    """The chat that asks a sample's question, with the answer begun if the mode says so."""
    content = [
        {"type": "image_pil", "image_pil": sample.image},
        {"type": "text", "text": sample.question},
    ]
    chat: list[Any] = [{"role": "user", "content": content}]
    if mode.continues_answer:
        chat.append({"role": "assistant", "content": sample.answer})
    return chat
