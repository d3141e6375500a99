"""What single heads are worth: knock-outs of KV heads, silenced query heads, concentration."""

from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from sparsemm_vllm.commands.evaluate.metrics import Marks, draw_pictures, interval

from .model import OfflineModel
from .pruning import without_head
from .subjects import Questions, exact_words

TOP = 0.05  # share of the query heads that the paper silences


def loss_rises(model: OfflineModel, questions: Questions) -> Tensor:
    """Rise of the true answer's loss, nats a token, when one KV head keeps only its window.

    Returns ``[L, Hkv, N]``; negative where the answer becomes more likely.
    """
    prompts = model.prompts(questions.samples, questions.contexts)
    dense = model.answer_loss(prompts, prompts.everything(), questions.answers)
    rises = [
        model.answer_loss(prompts, without_head(prompts, layer, head), questions.answers) - dense
        for layer in track(range(model.L), "knock-outs")
        for head in range(model.Hkv)
    ]
    return torch.stack(rises).unflatten(0, (model.L, model.Hkv))


def knocked_out(model: OfflineModel, questions: Questions) -> tuple[float, list[list[float]]]:
    """Words exactly right: dense, and ``[L][Hkv]`` with that one head keeping only its window."""
    prompts = model.prompts(questions.samples, questions.contexts)

    def exact(shown: Tensor) -> float:
        answers = model.answer(prompts, shown, questions.answers)
        return round(float(exact_words(Marks.of(questions.answers, answers))), 4)

    return exact(prompts.everything()), [
        [exact(without_head(prompts, layer, head)) for head in range(model.Hkv)]
        for layer in track(range(model.L), "knock-outs")
    ]


def silenced(
    model: OfflineModel, questions: Questions, scores: Tensor, draws: int
) -> dict[str, Any]:
    """Words exactly right with the best 5 % of the query heads silenced, and with random ones.

    A silenced head puts out zeros, for prompt and answer. The random ones are drawn from the heads
    that are not among the best.
    """
    pictures = draw_pictures(len(questions.samples))
    order = scores.flatten().argsort(descending=True, stable=True)
    count = max(1, round(TOP * len(order)))

    def exact(heads: Tensor) -> tuple[float, np.ndarray]:
        model.silenced = torch.zeros(model.L * model.Hq, dtype=torch.bool)
        model.silenced[heads] = True
        model.silenced = model.silenced.view(model.L, model.Hq)
        prompts = model.prompts(questions.samples, questions.contexts)
        answers = model.answer(prompts, prompts.everything(), questions.answers)
        marks = Marks.of(questions.answers, answers)
        return float(exact_words(marks)), exact_words(marks, pictures)

    generator = torch.Generator().manual_seed(0)
    dense, dense_draws = exact(order[:0])
    visual, visual_draws = exact(order[:count])
    others = [
        exact(order[count:][torch.randperm(len(order) - count, generator=generator)[:count]])
        for _ in track(range(draws), "random heads")
    ]
    exact(order[:0])  # no head stays silenced
    random = float(np.mean([one for one, _ in others]))
    random_draws = np.mean([many for _, many in others], 0)
    lost, lost_random = dense_draws - visual_draws, dense_draws - random_draws
    low, high = interval(lost / np.where(lost_random > 0, lost_random, np.nan))
    return {
        "heads": count,
        "dense": round(dense, 4),
        "visual": round(visual, 4),
        "visual_95": [round(x, 4) for x in interval(visual_draws)],
        "random": round(random, 4),
        "random_95": [round(x, 4) for x in interval(random_draws)],
        "each_random": [round(one, 4) for one, _ in others],
        "drop_ratio": _rounded((dense - visual) / (dense - random)) if dense > random else None,
        "drop_ratio_95": [_rounded(low), _rounded(high)],
    }


def _rounded(ratio: float) -> float | None:
    """None where random heads cost nothing in some draw: there is no ratio then."""
    return None if np.isnan(ratio) else round(ratio, 2)
