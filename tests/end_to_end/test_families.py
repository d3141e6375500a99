"""Model families with tiny random weights in vLLM's engine, against transformers with masks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.oracle import Oracle
from support.engines import (
    BLOCK,
    WINDOW,
    Engine,
    assert_same,
    assert_same_kept,
    settings,
    share_expert_group,
)
from support.tiny import (
    KV_HEADS,
    make_llava_next,
    make_qwen2_5_vl,
    make_qwen2_vl,
    make_qwen3_vl,
    make_qwen3_vl_moe,
    picture,
    skewed_profile,
)

pytestmark = pytest.mark.engine

BUDGET = 40
TOKENS = 10
QUESTION = "what does the picture say? answer with all of it, please"
FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "LLaVA-NeXT": (make_llava_next, "<image>"),
    "Qwen2-VL": (make_qwen2_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "Qwen2.5-VL": (make_qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "Qwen3-VL": (make_qwen3_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "Qwen3-VL-MoE": (make_qwen3_vl_moe, "<|vision_start|><|image_pad|><|vision_end|>"),
}


@dataclass(frozen=True)
class Family:
    """An engine, transformers, and what stands for a picture in a prompt."""

    name: str
    engine: Engine
    oracle: Oracle
    image: str


FEW = [pytest.param(f, marks=pytest.mark.slow) if "MoE" in f else f for f in FAMILIES]


@pytest.fixture(scope="module", params=FEW)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    make, image = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("family")
    model = make(folder / "model")
    share_expert_group()
    limits = {"image": 2, "video": 1} if request.param.startswith("Qwen2") else {"image": 2}
    engine = Engine(model, settings(BUDGET, folder / "kept"), limit_mm_per_prompt=limits)
    yield Family(request.param, engine, Oracle(model, engine.layout), image)
    assert engine.all_free()


def wide(seed: int) -> Image.Image:
    """A picture that is not square: families with any resolution give it other tokens."""
    return picture(seed).resize((224, 112))


def assert_like_transformers(
    family: Family, prompt: dict[str, Any], images: list[Any], **options: Any
) -> None:
    """Pruned and dense, alone and cold; then cached, and chunked beside another prompt."""
    engine, oracle = family.engine, family.oracle
    pruned = engine.layout
    scores = skewed_profile().tensor()
    for layout in (
        CacheLayout.from_scores(scores, KV_HEADS, BUDGET, WINDOW, method="full"),
        pruned,
    ):
        engine.use(layout)
        oracle.layout = layout
        (cold,) = engine.generate(prompt, max_tokens=TOKENS)
        tokens, logprobs = oracle.generate(prompt["prompt"], images, TOKENS, **options)
        assert cold.tokens == tokens
        np.testing.assert_allclose(cold.logprobs, logprobs, atol=1e-4)
    kept = engine.kept(cold)
    assert_same_kept(kept, {head: positions.numpy() for head, positions in oracle.kept.items()})
    lengths = {len(positions) for positions in kept.values()}
    assert max(lengths) > 2 * min(lengths), "the heads' budgets should differ"

    (cached,) = engine.generate(prompt, max_tokens=TOKENS)
    assert cached.cached_tokens == (cold.prompt_tokens - WINDOW) // BLOCK * BLOCK
    assert_same(cached, cold)
    engine.forget()
    short = {"prompt": "<s>short"}
    _, chunked = engine.generate(short, prompt, max_tokens=TOKENS, chunk=60)
    assert_same(chunked, cold)
    assert_same_kept(engine.kept(chunked), kept)


def test_pictures(family: Family) -> None:
    images = [wide(1), picture(2)]
    text = "<s>" + family.image * 2 + QUESTION
    prompt = {"prompt": text, "multi_modal_data": {"image": images}}
    assert_like_transformers(family, prompt, images)


def test_video(family: Family) -> None:
    """Six frames; their times shape the positions of Qwen2.5-VL."""
    if not family.name.startswith("Qwen2"):
        pytest.skip("takes none, or dense answers of vLLM and transformers differ (Qwen3-VL)")
    frames = np.random.default_rng(3).integers(0, 255, (6, 64, 96, 3), dtype=np.uint8)
    video: Any = frames
    options: dict[str, Any] = {"videos": [frames], "do_sample_frames": False}
    if family.name == "Qwen2.5-VL":
        about = {
            "fps": 2.0,
            "duration": 3.0,
            "total_num_frames": 6,
            "frames_indices": list(range(6)),
        }
        video = frames, about | {"video_backend": "opencv", "do_sample_frames": False}
        options["video_metadata"] = [about]
    text = "<|vision_start|><|video_pad|><|vision_end|>" + QUESTION
    prompt = {"prompt": text, "multi_modal_data": {"video": video}}
    assert_like_transformers(family, prompt, [], **options)
