"""Which word of a picture each token of an answer belongs to, for any tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsemm_vllm.data.pictures import Sample

Span = tuple[int, int]  # first character and the one behind the last
UNFINISHED = "\ufffd"  # what a part of a character's bytes decodes to
UNSPACED = 0x2E80  # from here on, scripts write words without spaces between them


@dataclass(frozen=True)
class Place:
    """A word of a picture where a text says it.

    Attributes:
        word: index in the picture's words.
        span: characters of the text that say it.
    """

    word: int
    span: Span


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of some tokens, and the characters of it that each of them adds.

    A character whose bytes several tokens share is the last one's.
    """
    text, spans = "", []
    for end in range(1, len(ids) + 1):
        start = len(text)
        text = tokenizer.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).rstrip(UNFINISHED)
        spans.append((start, len(text)))
    return text, spans


def words_of_tokens(text: str, spans: Sequence[Span], places: Sequence[Place]) -> list[int | None]:
    """The word that each token lies in, white space aside; none if in no word, or not in one only.

    Args:
        text: text of the tokens.
        spans: characters of the text that each token adds.
        places: words of the picture, where the text says them.
    """
    owners: list[int | None] = []
    for start, end in spans:
        piece = text[start:end]
        first = start + len(piece) - len(piece.lstrip())
        last = start + len(piece.rstrip())
        words = {p.word for p in places if p.span[0] <= first < last <= p.span[1]}
        owners.append(words.pop() if len(words) == 1 else None)
    return owners


def places_in_answer(text: str, sample: Sample) -> list[Place]:
    """Where a text that ends with the sample's true answer says its words; empty if it does not."""
    text = text.rstrip()
    if not text.endswith(sample.answer.rstrip()):
        return []
    offset = len(text) - len(sample.answer.rstrip())
    return [
        Place(word, (offset + start, offset + end))
        for word, (start, end) in zip(sample.answer_words, sample.answer_spans, strict=True)
    ]


def places_anywhere(text: str, sample: Sample) -> list[Place]:
    """Everywhere that a text says a word of the picture, as a separate word."""
    places = []
    for index, word in enumerate(sample.words):
        start = text.find(word.text)
        while start >= 0:
            end = start + len(word.text)
            if not _goes_on(text, start) and not _goes_on(text, end):
                places.append(Place(index, (start, end)))
            start = text.find(word.text, start + 1)
    return places


def _goes_on(text: str, at: int) -> bool:
    """Whether the characters before and behind are of one word."""
    around = text[max(0, at - 1) : at + 1]
    return at > 0 and len(around) == 2 and all(c.isalnum() and ord(c) < UNSPACED for c in around)
