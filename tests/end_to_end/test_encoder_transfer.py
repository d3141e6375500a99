"""Pictures that another instance encodes: vLLM's example of an encoder connector, over files."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from support import window_pictures as window
from support.engines import Engine, assert_same, settings
from support.tiny import make_qwen2_vl

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Writes what it encodes, and reads what is there."""
    folder = tmp_path_factory.mktemp("encoded")
    transfer = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    engine = Engine(
        make_qwen2_vl(folder / "model"),
        settings(100) | {"window": window.WINDOW},
        limit_mm_per_prompt={"image": 2, "video": 0},
        max_num_batched_tokens=window.WINDOW + 8,
        ec_transfer_config=transfer,
    )
    scheduler = engine.scheduler  # with a connector vLLM gives the cache more room than to others
    scheduler.max_num_encoder_input_tokens = window.WINDOW + 8
    scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=window.WINDOW + 8)
    return engine


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


def test_pictures_from_another_encoder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together and alone, also a small one in the window behind one that fills the cache."""
    seeds = 1, 2, 3, 4
    encoded = [window.ask(seed, engine=engine)[0] for seed in seeds]
    runner = engine.core.model_executor.driver_worker.worker.model_runner

    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("this instance encodes what it should read")

    monkeypatch.setattr(runner.model, "embed_multimodal", encode)
    cache, schedule, sizes = (
        engine.scheduler.encoder_cache_manager,
        engine.scheduler.schedule,
        set(),
    )

    def noting(*args: Any, **kwargs: Any) -> Any:
        sizes.add(cache.cache_size)
        return schedule(*args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "schedule", noting)
    for together in ([[seed] for seed in seeds], [seeds]):
        engine.forget()
        engine.llm.llm_engine.reset_encoder_cache()
        answers = [answer for some in together for answer in window.ask(*some, engine=engine)]
        assert max(a.cached_tokens for a in answers) < 43, "a picture came from the prefix cache"
        for read, own in zip(answers, encoded, strict=True):
            assert_same(read, own)
    assert max(sizes) == cache.cache_size + 8, "lent while the window needs it"
