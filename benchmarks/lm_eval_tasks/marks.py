"""How lm-eval marks the answers: as `sparsemm eval` does."""

from typing import Any

from sparsemm_vllm.commands.evaluate.metrics import anls, words_right


def only_qa(questions: Any) -> Any:
    """Questions about one line."""
    return questions.filter(lambda row: row["task"] == "qa")


def only_ocr(questions: Any) -> Any:
    """Pictures to be read."""
    return questions.filter(lambda row: row["task"] == "ocr")


def picture(row: dict[str, Any]) -> list[Any]:
    """What stands for ``<image>`` in the question."""
    return [row["image"].convert("RGB")]


def mark(row: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Words exactly right of all words, and ANLS."""
    truth, answer = row["answer"], results[0]
    return {
        "exact_words": (words_right(truth, answer), len(truth.split())),
        "anls": anls([truth], answer),
    }


def pooled(counts: list[tuple[int, int]]) -> float:
    """Right words of all words of all pictures."""
    return sum(right for right, _ in counts) / sum(words for _, words in counts)
