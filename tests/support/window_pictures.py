"""Prompts with a small picture in the window, behind one that fills vLLM's encoder cache."""

from typing import Any

from PIL import Image

from support.engines import Answer, Engine
from support.tiny import picture

WINDOW = 64
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# 128 tokens: the large picture lies from 43 to 107, the window begins at 64, the small one at 109.
TEXT = "<s>some text before the picture, and so on. " + 2 * IMAGE + "??"
TOKENS = 6
MOST_STEPS = 200


def pictures(seed: int) -> list[Image.Image]:
    """64 embeddings, and 16."""
    return [picture(seed).resize((224, 224)), picture(seed + 100)]


def prompt(seed: int) -> dict[str, Any]:
    return {"prompt": TEXT, "multi_modal_data": {"image": pictures(seed)}}


def ask(
    *seeds: int, engine: Engine, tokens: int = TOKENS, sizes: list[int] | None = None
) -> list[Answer]:
    """Answers, and the cache's size after each step; fails if the engine goes on without an end."""
    seen = [] if sizes is None else sizes

    def watch() -> None:
        seen.append(engine.scheduler.encoder_cache_manager.cache_size)
        assert len(seen) < MOST_STEPS, "the requests wait for ever"

    prompts = [prompt(seed) for seed in seeds]
    try:
        return engine.generate(*prompts, max_tokens=tokens, watch=watch)
    finally:
        unfinished = list(engine.scheduler.requests)
        engine.llm.llm_engine.abort_request(unfinished)
