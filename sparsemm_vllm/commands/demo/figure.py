"""The picture beside what a few heads kept of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparsemm_vllm.commands.figures import ACCENT, FADED, INK, save_figure

if TYPE_CHECKING:
    pass

PANELS = 5


def image_token_positions(model: Path, question: str, prompt_tokens: int) -> np.ndarray:
    """Positions in the prompt of a picture's tokens, in raster order.

    Args:
        model: folder of a LLaVA with one token per patch.
        question: the text beside the picture in the chat message.
        prompt_tokens: `n`, with the picture's tokens.

    Raises:
        ValueError: if the prompt holds another number of picture tokens than the model makes.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = ids.index(config.image_token_index)
    count = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if len(ids) - 1 + count != prompt_tokens:
        raise ValueError(
            f"a prompt of {len(ids) - 1} text tokens and {count} picture tokens was sent, the "
            f"server counted {prompt_tokens}"
        )
    return np.arange(start, start + count)


def _choose_heads(kept: dict[tuple[int, int], np.ndarray]) -> list[tuple[int, int]]:
    """Heads from the largest budget to the smallest, evenly spaced in rank."""
    ranked = sorted(kept, key=lambda head: len(kept[head]), reverse=True)
    ranks = np.linspace(0, len(ranked) - 1, min(PANELS, len(ranked))).round().astype(int)
    return [ranked[rank] for rank in ranks]


def _masked(picture: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The picture, washed out where no token was kept; `seen` is ``[rows, columns]``."""
    height, width = picture.shape[:2]
    rows, columns = seen.shape
    mask = np.kron(seen, np.ones((height // rows, width // columns)))[..., None]
    grey = picture.mean(-1, keepdims=True)
    return np.where(mask > 0, picture, 0.12 * grey + 0.88 * 255).astype(np.uint8)


def draw_kept_map(
    image: Image.Image,
    report: dict[str, Any],
    kept: dict[tuple[int, int], np.ndarray],
    positions: np.ndarray,
    path: Path,
) -> None:
    """Save a picture and, for heads from the largest budget to the smallest, its kept patches.

    Args:
        image: square, as sent.
        report: of the demo.
        kept: kept positions by (layer, KV head), the window not among them.
        positions: of the picture's tokens in the prompt, raster order.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side = round(len(positions) ** 0.5)
    picture = np.asarray(image.convert("RGB"))
    heads = _choose_heads(kept)
    n, window = report["prompt_tokens"], report["settings"]["window"]

    figure, axes = plt.subplots(2, 3, figsize=(9.6, 8.2), facecolor="white")
    panels = list(axes.flat)
    panels[0].imshow(picture)
    panels[0].set_title("the picture", fontsize=11, color=INK, loc="left", fontweight="bold")
    panels[0].set_xlabel(f"{len(positions)} of the prompt's {n} tokens", color=FADED, fontsize=9)
    for panel, head in zip(panels[1:], heads, strict=False):
        seen = np.isin(positions, kept[head]) | (positions >= n - window)
        panel.imshow(_masked(picture, seen.reshape(side, side)))
        title = f"layer {head[0]}, KV head {head[1]}"
        panel.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold")
        count = len(kept[head]) + window
        panel.set_xlabel(f"keeps {count} tokens, {seen.sum()} of the picture", fontsize=9)
        panel.xaxis.label.set_color(FADED)
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_color("#d0d4da")
    for panel in panels[1 + len(heads) :]:
        panel.axis("off")

    blocks = report["kv_blocks"]
    figure.suptitle(
        f"{blocks['after_pruning']} KV blocks instead of {blocks['dense']}, "
        f"{report['words_right']} of {report['words']} words right",
        x=0.02, y=0.975, ha="left", fontsize=15, color=INK, fontweight="bold",
    )  # fmt: skip
    lines = {"Question": "question", "True text": "true_text", "Answer": "answer"}
    for i, (name, key) in enumerate(lines.items()):
        y, colour = 0.925 - 0.027 * i, ACCENT if key == "answer" else INK
        figure.text(0.02, y, name, fontsize=10, color=FADED, va="top")
        figure.text(0.105, y, report[key], fontsize=10, color=colour, va="top")
    figure.subplots_adjust(left=0.02, right=0.98, top=0.81, bottom=0.035, wspace=0.07, hspace=0.17)
    save_figure(figure, path)
    plt.close(figure)
