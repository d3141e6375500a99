"""LoRA on text layers and on the vision tower, and priorities in a pool that is too small."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsemm_vllm.commands.check.oracle import Oracle
from support.engines import (
    BLOCK,
    DIGITS,
    HELLO,
    WINDOW,
    Engine,
    ask,
    assert_same,
    assert_same_kept,
    settings,
)
from support.tiny import make_qwen2_vl, picture

pytestmark = pytest.mark.engine

BUDGET = 40
TOKENS = 48
RANK = 8
TEXT = re.compile(r"model\.language_model\..*self_attn\.[qkv]_proj\.weight")
PICTURE = re.compile(r"model\.visual\.(blocks\..*attn\.(qkv|proj)|merger\.mlp\..)\.weight")


def make_adapter(folder: Path, model: torch.nn.Module, adapted: re.Pattern[str]) -> dict[str, Any]:
    """A LoRA of these weights of a model; returns what it adds to each."""
    folder.mkdir()
    random = torch.Generator().manual_seed(1)
    saved, added = {}, {}
    weights = {name: w for name, w in model.named_parameters() if adapted.fullmatch(name)}
    for name, weight in weights.items():
        outputs, inputs = weight.shape
        a = 0.15 * torch.randn(RANK, inputs, generator=random)
        b = 0.15 * torch.randn(outputs, RANK, generator=random)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        saved |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        added[name] = b @ a
    save_file(saved, folder / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-2] for name in weights})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(
        model,
        settings(BUDGET, tmp_path_factory.mktemp("kept")),
        limit_mm_per_prompt={"image": 2},
        enable_lora=True,
        max_loras=2,  # vLLM's torch operators give tokens without an adapter the last slot's
        max_lora_rank=RANK,
        scheduling_policy="priority",
        num_gpu_blocks_override=28,
        max_model_len=256,
    )


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


def assert_adapted(
    engine: Engine, model: Path, text: str, folder: Path, adapted: re.Pattern[str]
) -> None:
    """Scores, kept tokens and answers are the adapted model's; the base model is beside it."""
    from vllm.lora.request import LoRARequest

    images = [picture(1), picture(2)]
    prompt = {"prompt": text, "multi_modal_data": {"image": images}}
    oracle = Oracle(model, engine.layout)
    added = make_adapter(folder, oracle.model, adapted)
    adapter: dict[str, Any] = {"lora_request": LoRARequest("a", 1, str(folder))}
    answers = []
    for options in ({}, adapter):
        (answer,) = engine.generate(prompt, max_tokens=20, options=[options])
        assert answer.cached_tokens == 0, "an adapter's keys are not the base model's"
        tokens, logprobs = oracle.generate(text, images, 20)
        assert answer.tokens == tokens
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
        kept = {head: positions.numpy() for head, positions in oracle.kept.items()}
        assert_same_kept(engine.kept(answer), kept)
        answers.append(answer)
        with torch.no_grad():
            for name, parameter in oracle.model.named_parameters():
                if name in added:
                    parameter += added.pop(name)
    assert not added, f"transformers has no {sorted(added)}"
    assert answers[0].tokens != answers[1].tokens
    together = engine.generate(prompt, prompt, max_tokens=20, options=[{}, adapter])
    for ours, alone in zip(together, answers, strict=True):
        assert ours.cached_tokens == (alone.prompt_tokens - WINDOW) // BLOCK * BLOCK
        assert_same(ours, alone)


def test_adapter_on_text_layers(model: Path, engine: Engine, tmp_path: Path) -> None:
    assert_adapted(engine, model, DIGITS, tmp_path / "adapter", TEXT)


def test_adapter_on_tower_and_connector(tmp_path: Path) -> None:
    """Pictures are other vectors with it: each adapter has its own, cached and encoded."""
    model = make_qwen2_vl(tmp_path / "model")
    engine = Engine(
        model,
        settings(BUDGET, tmp_path / "kept"),
        limit_mm_per_prompt={"image": 2},
        enable_lora=True,
        enable_tower_connector_lora=True,
        max_loras=2,
        max_lora_rank=RANK,
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    text = DIGITS.replace("<image>", image)
    assert_adapted(engine, model, text, tmp_path / "adapter", PICTURE)
    engine.rest()


def test_priorities(engine: Engine) -> None:
    """The less urgent are preempted, and answer as if they had been alone."""
    prompts = [ask(HELLO, 1), ask(DIGITS, 1, 2)] * 3
    alone = [engine.generate(prompt, max_tokens=TOKENS)[0] for prompt in prompts[:2]] * 3
    engine.forget()
    preempted: set[str] = set()

    def watch() -> None:
        preempted.update(
            r.request_id for r in engine.scheduler.requests.values() if r.num_preemptions
        )

    urgency = [{"priority": 5 - i} for i in range(6)]  # the last is the most urgent
    answers = engine.generate(*prompts, max_tokens=TOKENS, watch=watch, options=urgency)
    assert preempted, "nothing was preempted: the pool is too large for this test"
    ids = [answer.request_id for answer in answers]
    assert not any(request.startswith(ids[-1]) for request in preempted), "the most urgent waited"
    for answer, expected in zip(answers, alone, strict=True):
        assert_same(answer, expected)
        assert_same_kept(engine.kept(answer), engine.kept(expected))
