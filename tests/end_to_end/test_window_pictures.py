"""A small picture in the window, behind a large one that fills vLLM's encoder cache."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparsemm_vllm.commands.check.oracle import Oracle
from support.engines import Engine, settings
from support.tiny import make_qwen2_vl
from support.window_pictures import IMAGE, MOST_STEPS, TEXT, TOKENS, WINDOW, ask, pictures, prompt

pytestmark = pytest.mark.engine


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
    """What a request got beyond vLLM's sizes is not there after it."""
    scheduler, cache = engine.scheduler, engine.scheduler.encoder_cache_manager
    before = cache.cache_size, scheduler.max_num_encoder_input_tokens
    yield
    engine.rest()
    assert (cache.cache_size, scheduler.max_num_encoder_input_tokens) == before
    assert cache.num_freeable_slots == cache.cache_size
    assert cache.num_free_slots == cache.cache_size - sum(cache.num_embeds_by_hash.values())


def test_the_second_picture_gets_room(
    engine: Engine, answer: tuple[list[int], list[float]]
) -> None:
    size = engine.scheduler.encoder_cache_manager.cache_size
    assert size < 64 + 16, "the cache holds both pictures: this shows nothing"
    sizes: list[int] = []
    (ours,) = ask(1, engine=engine, sizes=sizes)
    assert ours.prompt_tokens == 2 * WINDOW
    assert ours.tokens == answer[0]
    np.testing.assert_allclose(ours.logprobs, answer[1], atol=1e-4)
    assert set(sizes) == {size, 64 + 16}
    assert sizes[-TOKENS // 2 :] == [size] * (TOKENS // 2), "larger while nobody needs it"


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


def test_room_that_an_aborted_request_waited_for(engine: Engine) -> None:
    from vllm import SamplingParams

    llm, cache = engine.llm.llm_engine, engine.scheduler.encoder_cache_manager
    size = cache.cache_size
    llm.add_request("waits", prompt(9), SamplingParams(max_tokens=1, temperature=0))
    for _ in range(MOST_STEPS):
        if cache.cache_size > size:
            break
        llm.step()
    assert cache.cache_size == 64 + 16
    llm.abort_request(["waits"])
    engine.generate({"prompt": "<s>text"}, max_tokens=2)
    assert cache.cache_size == size


def test_pictures_beyond_the_size_make_way(engine: Engine) -> None:
    """The cache holds both when it is smaller again: other pictures take their place."""
    cache = engine.scheduler.encoder_cache_manager
    ask(10, engine=engine, tokens=1)
    assert sum(cache.num_embeds_by_hash.values()) > cache.cache_size
    large = {"prompt": f"<s>{IMAGE}", "multi_modal_data": {"image": pictures(11)[:1]}}
    engine.generate(large, max_tokens=1)
    assert sum(cache.num_embeds_by_hash.values()) <= cache.cache_size
