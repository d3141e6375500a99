"""A small picture in the window, behind a large one that fills vLLM's encoder cache."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engines import Answer, Engine, settings
from PIL import Image
from tiny import make_qwen2_vl, picture

from sparsemm_vllm.check_run.oracle import Oracle

pytestmark = pytest.mark.engine

WINDOW = 64
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# 128 tokens: the large picture lies from 43 to 107, the window begins at 64, the small one at 109.
TEXT = "<s>some text before the picture, and so on. " + 2 * IMAGE + "??"
TOKENS = 6
MOST_STEPS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def answer(model: Path, engine: Engine) -> tuple[list[int], list[float]]:
    return Oracle(model, engine.layout).generate(TEXT, pictures(1), TOKENS)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    """Its encoder cache holds as many embeddings as a step has tokens: not both pictures."""
    return Engine(
        model,
        settings(100) | {"window": WINDOW},
        limit_mm_per_prompt={"image": 2, "video": 0},
        max_num_batched_tokens=WINDOW + 8,
    )


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


def pictures(seed: int) -> list[Image.Image]:
    """64 embeddings, and 16."""
    return [picture(seed).resize((224, 224)), picture(seed + 100)]


def ask(*seeds: int, engine: Engine, tokens: int = TOKENS) -> list[Answer]:
    """Answers; fails if the engine goes on without an end."""
    steps = 0

    def watch() -> None:
        nonlocal steps
        steps += 1
        assert steps < MOST_STEPS, "the requests wait for ever"

    prompts = [{"prompt": TEXT, "multi_modal_data": {"image": pictures(s)}} for s in seeds]
    try:
        return engine.generate(*prompts, max_tokens=tokens, watch=watch)
    finally:
        unfinished = list(engine.scheduler.requests)
        engine.llm.llm_engine.abort_request(unfinished)


def test_the_second_picture_gets_room(
    engine: Engine, answer: tuple[list[int], list[float]]
) -> None:
    size = engine.scheduler.encoder_cache_manager.cache_size
    assert size < 64 + 16, "the cache holds both pictures: this shows nothing"
    (ours,) = ask(1, engine=engine)
    assert ours.prompt_tokens == 2 * WINDOW
    assert ours.tokens == answer[0]
    np.testing.assert_allclose(ours.logprobs, answer[1], atol=1e-4)
    assert engine.scheduler.encoder_cache_manager.cache_size == 64 + 16


def test_a_prefix_hit_needs_both_at_once(
    engine: Engine, answer: tuple[list[int], list[float]]
) -> None:
    ask(1, engine=engine, tokens=1)
    engine.llm.llm_engine.reset_encoder_cache()
    (ours,) = ask(1, engine=engine)
    assert ours.cached_tokens == WINDOW, "the hit should end where the window begins"
    assert ours.tokens == answer[0]


def test_several_that_wait_for_one_another(
    engine: Engine, answer: tuple[list[int], list[float]]
) -> None:
    together = ask(1, 2, 3, 4, engine=engine)
    assert together[0].tokens == answer[0]
    assert len({tuple(ours.tokens) for ours in together}) == 4
