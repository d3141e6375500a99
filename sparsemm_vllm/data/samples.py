"""What a head profile is measured on: pictures with questions, answers and the boxes of words."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.errors import UserError


class DataError(UserError):
    """Data that cannot be read or holds nothing to measure; one line: which, and what to do."""


@dataclass(frozen=True)
class SampleSet:
    """Samples that were chosen from a source.

    Attributes:
        samples: samples, in the order in which they were chosen.
        name: name of the source, without paths.
        hash: SHA-256, hexadecimal, of all that the samples hold, pixels included.
        skipped: number of samples and words that were left out, by reason.
    """

    samples: list[Sample]
    name: str
    hash: str
    skipped: dict[str, int] = field(default_factory=dict)


def hash_samples(samples: Iterable[Sample]) -> str:
    """SHA-256, hexadecimal, of pixels, words, boxes, questions and answers; paths do not count."""
    digest = hashlib.sha256()
    for sample in samples:
        words = [(word.text, word.box) for word in sample.words]
        text = sample.question, sample.answer, words, sample.answer_words, sample.image.size
        digest.update(repr(text).encode())
        digest.update(sample.image.convert("RGB").tobytes())
    return digest.hexdigest()
