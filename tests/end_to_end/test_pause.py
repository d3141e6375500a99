"""Pauses: requests that are kept go on as if there had been none, others leave nothing behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsemm_vllm import environment
from support.engines import (
    DIGITS,
    HELLO,
    Answer,
    Engine,
    ask,
    assert_same,
    assert_same_kept,
    settings,
)

pytestmark = pytest.mark.engine

PROMPTS = [ask(HELLO, 1), ask(DIGITS, 1, 2), ask("<s>short")]
TOKENS = 24
NEEDS_GPU = pytest.mark.skipif(not environment.has_gpu(), reason="sleep mode needs a GPU")


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("kept")
    options = {"enable_sleep_mode": True} if environment.has_gpu() else {}
    return Engine(model, settings(40, folder), limit_mm_per_prompt={"image": 2}, **options)


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Answer]:
    """Each prompt cold, alone and not paused."""
    answers = []
    for prompt in PROMPTS:
        answers += engine.generate(prompt, max_tokens=TOKENS)
        engine.forget()
    return answers


def pause(engine: Engine, **options: Any) -> None:
    """As the front end does, which empties its side of the picture cache too."""
    if options.get("clear_cache", True):
        engine.llm.llm_engine.reset_mm_cache()
    engine.core.pause_scheduler(**options)


class Pauses:
    """Pauses the engine after some of its steps: while prompts are chunked, and while it decodes.

    Args:
        engine: engine with its scheduler in this process.
        between: function to call while the engine is paused.
        options: arguments of `EngineCore.pause_scheduler`.
    """

    def __init__(self, engine: Engine, between: Any = None, **options: Any) -> None:
        self.engine, self.between, self.options = engine, between, options
        self.steps = 0
        self.preempted = 0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps not in (1, 3, 6, 13):
            return
        core, scheduler = self.engine.core, self.engine.scheduler
        assert scheduler.running
        pause(self.engine, **self.options)
        assert core.is_scheduler_paused()
        assert not self.engine.llm.llm_engine.step(), "nothing is computed in a pause"
        self.preempted += sum(r.num_preemptions for r in scheduler.waiting)
        if self.between is not None:
            self.between()
        core.resume_scheduler()


def assert_as_alone(engine: Engine, answers: list[Answer], alone: list[Answer]) -> None:
    for answer, expected in zip(answers, alone, strict=True):
        assert_same(answer, expected)
    for answer, expected in zip(answers[:2], alone[:2], strict=True):
        assert_same_kept(engine.kept(answer), engine.kept(expected))


@pytest.mark.parametrize("clear_cache", [False, True], ids=["caches stay", "caches are cleared"])
def test_kept_requests_go_on(engine: Engine, alone: list[Answer], clear_cache: bool) -> None:
    """With caches that are cleared they are preempted, computed and pruned again."""
    pauses = Pauses(engine, mode="keep", clear_cache=clear_cache)
    answers = engine.generate(*PROMPTS, max_tokens=TOKENS, chunk=60, watch=pauses)
    assert pauses.steps > 13
    assert bool(pauses.preempted) == clear_cache
    assert_as_alone(engine, answers, alone)


def test_others_end_at_once(engine: Engine, alone: list[Answer]) -> None:
    """Mode abort: all blocks are free during the pause, and the engine serves after it."""
    core = engine.llm.llm_engine
    from vllm import SamplingParams

    for i, prompt in enumerate(PROMPTS):
        core.add_request(f"ends-{i}", prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    for _ in range(4):
        core.step()
    assert not engine.all_free()
    pause(engine, mode="abort")
    assert engine.all_free()
    assert not engine.manager.prompts
    core.abort_request([f"ends-{i}" for i in range(len(PROMPTS))])  # the front end's side
    engine.core.resume_scheduler()
    answers = engine.generate(*PROMPTS, max_tokens=TOKENS)
    assert answers[0].cached_tokens == 0, "the cache was cleared"
    assert_as_alone(engine, answers, alone)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("level", [0, 1, 2])
def test_kept_requests_go_on_after_sleep(engine: Engine, alone: list[Answer], level: int) -> None:
    """Levels 1 and 2 take the KV cache away: kept requests are computed and pruned again."""

    def sleep() -> None:
        engine.llm.llm_engine.reset_mm_cache()
        engine.core.sleep(level, mode="keep")
        engine.core.wake_up(["scheduling"] if level == 0 else None)
        if level == 2:
            engine.llm.collective_rpc("reload_weights")

    pauses = Pauses(engine, sleep, mode="keep", clear_cache=False)
    answers = engine.generate(*PROMPTS, max_tokens=TOKENS, chunk=60, watch=pauses)
    assert pauses.steps > 13
    assert_as_alone(engine, answers, alone)
