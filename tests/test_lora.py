"""LoRA on a text layer, and requests of different priorities, in a pool that is too small."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import DIGITS, HELLO, Engine, ask, assert_same, assert_same_kept, settings
from safetensors.torch import save_file
from tiny import HEAD_SIZE, KV_HEADS, LAYERS, QUERY_HEADS, picture

from sparsemm_vllm.check_run.oracle import Oracle

pytestmark = pytest.mark.engine

BUDGET = 40
TOKENS = 48
RANK = 8
WIDTH = QUERY_HEADS * HEAD_SIZE
OUTPUTS = {"q_proj": WIDTH, "k_proj": KV_HEADS * HEAD_SIZE, "v_proj": KV_HEADS * HEAD_SIZE}


def make_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA of all queries, keys and values; returns what it adds to each weight."""
    folder.mkdir()
    random = torch.Generator().manual_seed(1)
    saved, added = {}, {}
    for layer in range(LAYERS):
        for name, outputs in OUTPUTS.items():
            module = f"language_model.layers.{layer}.self_attn.{name}"
            a, b = (
                0.15 * torch.randn(shape, generator=random)
                for shape in ((RANK, WIDTH), (outputs, RANK))
            )
            saved[f"base_model.model.model.{module}.lora_A.weight"] = a
            saved[f"base_model.model.model.{module}.lora_B.weight"] = b
            added[f"model.{module}.weight"] = b @ a
    save_file(saved, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*OUTPUTS]}
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


def test_adapter_on_text_layers(model: Path, engine: Engine, tmp_path: Path) -> None:
    """Scores, kept tokens and answers are the adapted model's; the base model is beside it."""
    from vllm.lora.request import LoRARequest

    added = make_adapter(tmp_path / "adapter")
    adapter: dict[str, Any] = {"lora_request": LoRARequest("a", 1, str(tmp_path / "adapter"))}
    prompt, images = ask(DIGITS, 1, 2), [picture(1), picture(2)]
    oracle = Oracle(model, engine.layout)
    answers = []
    for options in ({}, adapter):
        (answer,) = engine.generate(prompt, max_tokens=20, options=[options])
        assert answer.cached_tokens == 0, "an adapter's keys are not the base model's"
        tokens, logprobs = oracle.generate(DIGITS, images, 20)
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
        assert_same(ours, alone)


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
