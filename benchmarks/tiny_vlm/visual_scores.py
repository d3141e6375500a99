"""Visual scores of query heads, from the attentions of stock transformers."""

import torch
from torch import Tensor

from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.profiler.reliability import spearman

from .answers import Reader
from .glyphs import patch_overlap
from .vocabulary import IMAGE

METHOD = (
    "For every answer token of a word, a query head whose largest attention weight, in the row "
    "that predicts the token, falls on an image token inside the word's box scores 1 / (image "
    "tokens in the box); the score is the mean over samples of the sum of hits."
)


@torch.no_grad()
def sample_hits(reader: Reader, sample: Sample, context: str = "") -> Tensor:
    """Sum over the answer's tokens of ``1 / (image tokens in the word's box)``, ``[L, Hq]``.

    The reader's attention must be ``eager``, which returns its weights.
    """
    inputs = reader.inputs([sample], answers=True, contexts=[context])
    ids = inputs["input_ids"][0]
    image, P = int((ids == IMAGE).nonzero()[0]), int((ids == IMAGE).sum())
    words = [sample.words[i] for i in sample.answer_words]  # the answer's, in its order
    cover = patch_overlap([w.box for w in words], round(P**0.5)).reshape(len(words), P)
    inside = torch.from_numpy(cover > 0)
    rows, owners = word_rows([w.text for w in words], len(ids) - len(sample.answer) - 2)
    attentions = torch.stack(reader.model(**inputs, output_attentions=True).attentions)
    top = attentions[:, 0, :, rows].argmax(-1) - image  # [L, Hq, answer tokens]
    on_image = (top >= 0) & (top < P)
    hit = on_image & inside[owners, top.clamp(0, P - 1)]
    return (hit / inside.sum(1)[owners]).sum(-1)


def word_rows(words: list[str], start: int) -> tuple[Tensor, Tensor]:
    """Rows that predict the characters of the answer's words, and the word each belongs to.

    ``start`` is the row that predicts the answer's first character; words are a space apart.
    """
    rows: list[int] = []
    owners: list[int] = []
    for i, word in enumerate(words):
        rows += range(start, start + len(word))
        owners += [i] * len(word)
        start += len(word) + 1
    return torch.tensor(rows), torch.tensor(owners)


def concentration(scores: Tensor) -> dict[str, float]:
    """Share of the whole score that the best 5, 10 and 20 % of the heads hold."""
    ranked = scores.flatten().double().sort(descending=True).values
    counts = {share: max(1, round(share * len(ranked))) for share in (0.05, 0.1, 0.2)}
    return {
        f"{share:.0%}": round(float(ranked[:count].sum() / ranked.sum()), 4)
        for share, count in counts.items()
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of all elements; equal ones share their mean rank. NaN if all are equal."""
    found = spearman(a.double().numpy(), b.double().numpy())
    return float("nan") if found is None else round(found, 3)
