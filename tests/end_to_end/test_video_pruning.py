"""vLLM's own pruning of video tokens (EVS), before the prompt is computed, and ours after it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.engines import WINDOW, Engine, assert_same, assert_same_kept, settings
from support.tiny import make_qwen2_5_vl

pytestmark = pytest.mark.engine

FRAMES, SIDES = 4, (112, 140)  # two frames and 28 x 28 pixels a token, enlarged by the processor
VIDEO_TOKENS = FRAMES // 2 * 11 * 13
TOKENS = 10
UNCACHED = {"enable_prefix_caching": False}


def ask_about_video() -> dict[str, Any]:
    frames = np.random.default_rng(3).integers(0, 255, (FRAMES, *SIDES, 3), dtype=np.uint8)
    frames[2:] = frames[:2]  # most of this stands still: tokens of later frames go
    frames[2:, :30] //= 2
    about = {
        "fps": 2.0,
        "duration": FRAMES / 2,
        "total_num_frames": FRAMES,
        "frames_indices": list(range(FRAMES)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    text = "<|vision_start|><|video_pad|><|vision_end|>what happens? answer with all of it, please"
    return {"prompt": text, "multi_modal_data": {"video": (frames, about)}}


def test_what_is_left_of_a_video_is_pruned(tmp_path: Path) -> None:
    """Positions jump where tokens are gone; what the scheduler counts is what is left."""
    model = make_qwen2_5_vl(tmp_path / "model")
    limits = {"image": 0, "video": 1}
    (whole,) = Engine(model, None, limit_mm_per_prompt=limits).generate(
        ask_about_video(), max_tokens=TOKENS
    )
    options = {"limit_mm_per_prompt": limits, "video_pruning_rate": 0.5, **UNCACHED}
    (theirs,) = Engine(model, None, **options).generate(ask_about_video(), max_tokens=TOKENS)
    n = theirs.prompt_tokens
    assert whole.prompt_tokens - n == VIDEO_TOKENS // 2
    covering = Engine(model, settings(300), **options)
    (covered,) = covering.generate(ask_about_video(), max_tokens=TOKENS)
    assert_same(covered, theirs)

    engine = Engine(model, settings(40, tmp_path / "kept"), **options)
    (cold,) = engine.generate(ask_about_video(), max_tokens=TOKENS)
    assert np.abs(np.subtract(cold.logprobs, theirs.logprobs)).max() > 0.1
    kept = engine.kept(cold)
    lengths = engine.layout.kept_tokens(n)
    for (layer, head), positions in kept.items():
        assert len(positions) == lengths[layer][head]
        assert max(positions, default=0) < n - WINDOW
    engine.rest()
    short = {"prompt": "short"}
    _, chunked = engine.generate(short, ask_about_video(), max_tokens=TOKENS, chunk=40)
    assert_same(chunked, cold)
    assert_same_kept(engine.kept(chunked), kept)
    assert engine.all_free()


def test_positions_behind_a_cached_video_are_wrong(tmp_path: Path) -> None:
    """Of vLLM, dense: if this fails, vLLM has mended it, and we need not refuse it."""
    model = make_qwen2_5_vl(tmp_path / "model")
    with pytest.raises(ValueError, match="give --no-enable-prefix-caching with --video-pruning"):
        Engine(model, settings(40), video_pruning_rate=0.5)
    plain, pruning = (Engine(model, None, video_pruning_rate=rate) for rate in (None, 0.5))
    for engine, same in ((plain, True), (pruning, False)):
        cold, cached = (engine.generate(ask_about_video(), max_tokens=4)[0] for _ in range(2))
        assert cached.cached_tokens > VIDEO_TOKENS // 2
        assert np.allclose(cached.logprobs, cold.logprobs, atol=1e-4) == same
