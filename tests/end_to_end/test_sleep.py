"""Sleep and wake on a GPU: what the plugin keeps on the device survives both levels."""

from pathlib import Path

import pytest

from sparsemm_vllm import environment
from support.engines import DIGITS, Engine, ask, assert_same, assert_same_kept, settings
from support.tiny import make_llava

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not environment.has_gpu(), reason="vLLM's sleep mode needs a GPU"),
]


@pytest.mark.parametrize("level", [1, 2])
def test_answers_after_sleep(tmp_path: Path, level: int) -> None:
    """At level 2 the weights are gone and loaded again; one query head is masked throughout."""
    model = make_llava(tmp_path / "model")
    values = settings(40, tmp_path / "kept", mask_heads=[[1, 2]])
    engine = Engine(model, values, limit_mm_per_prompt={"image": 2}, enable_sleep_mode=True)
    (before,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=20)
    engine.llm.sleep(level)
    engine.llm.wake_up()
    if level == 2:
        engine.llm.collective_rpc("reload_weights")
    (after,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=20)
    assert after.cached_tokens == 0, "what is cached did not survive"
    assert_same(after, before)
    assert_same_kept(engine.kept(after), engine.kept(before))
    assert engine.all_free()
