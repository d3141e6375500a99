"""Mixtures of experts: spread over ranks, and told of pruned requests too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsemm_vllm.commands.check.oracle import Oracle
from sparsemm_vllm.engine.worker.probes.kept import load_kept
from support.engines import BLOCK, WINDOW, Engine, assert_same_kept, settings, share_expert_group
from support.tiny import LAYERS, make_qwen3_vl_moe, picture

pytestmark = pytest.mark.engine

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = "<s>" + IMAGE * 2 + "what does the picture say? answer with all of it, please"
OTHER = "<s>" + IMAGE + "another question about the first picture, which is longer than its answer"
TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    """With a pool in which several of these requests are preempted."""
    share_expert_group()
    return Engine(
        model,
        settings(40),
        limit_mm_per_prompt={"image": 2, "video": 0},
        enable_return_routed_experts=True,
        num_gpu_blocks_override=26,
        max_model_len=256,
    )


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


def routed(oracle: Oracle, text: str, seeds: list[int]) -> tuple[list[int], np.ndarray]:
    """The answer of transformers, and the experts of each token, ``[tokens, layers, 2]``."""
    layers = oracle.model.model.language_model.layers
    seen: list[list[np.ndarray]] = [[] for _ in layers]
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _module, _inputs, output, steps=steps: steps.append(output[2].numpy())
        )
        for layer, steps in zip(layers, seen, strict=True)
    ]
    tokens, _ = oracle.generate(text, [picture(seed) for seed in seeds], TOKENS)
    for hook in hooks:
        hook.remove()
    experts = np.stack([np.concatenate(steps) for steps in seen], axis=1)
    return tokens, np.sort(experts, axis=-1)


def ask(engine: Engine, *asked: tuple[str, list[int]]) -> list[Any]:
    """vLLM's outputs, which have the experts beside the tokens."""
    from vllm import SamplingParams

    prompts = [
        {"prompt": text, "multi_modal_data": {"image": [picture(seed) for seed in seeds]}}
        for text, seeds in asked
    ]
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return engine.llm.generate(prompts, params, use_tqdm=False)


def test_routed_experts(engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, with a cached prefix, and together in a pool that is too small."""
    oracle = Oracle(model, engine.layout)
    asked = (TEXT, [1, 2]), (OTHER, [1])
    expected = [routed(oracle, *one) for one in asked]

    def check(output: Any, expected: tuple[list[int], np.ndarray]) -> None:
        tokens, experts = expected
        (answer,) = output.outputs
        n = len(output.prompt_token_ids)
        assert engine.layout.is_pruned(n)
        assert list(answer.token_ids) == tokens
        assert answer.routed_experts.shape == (n + TOKENS - 1, len(engine.layout.capacities), 2)
        np.testing.assert_array_equal(np.sort(answer.routed_experts, axis=-1), experts)

    for one, answer in zip(asked, expected, strict=True):
        (cold,) = ask(engine, one)
        assert cold.num_cached_tokens < BLOCK * 3
        check(cold, answer)
        (hit,) = ask(engine, one)
        n = len(hit.prompt_token_ids)
        assert hit.num_cached_tokens == (n - WINDOW) // BLOCK * BLOCK
        check(hit, answer)
    preempted: list[Any] = []
    preempt = engine.scheduler._preempt_request

    def count(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request)
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", count)
    for output, answer in zip(ask(engine, *asked * 4), expected * 4, strict=True):
        check(output, answer)
    assert preempted, "nothing was preempted: the pool is too large for this test"


def test_experts_with_another_activation_are_refused_on_the_cpu() -> None:
    from sparsemm_vllm.engine.cpu.platform import define_operators

    define_operators()
    x, w13, w2 = torch.ones(1, 4), torch.ones(1, 8, 4), torch.ones(1, 4, 4)
    weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    arguments = x.clone(), x, w13, w2, None, None, weights, ids, False
    torch.ops._C.cpu_fused_moe(*arguments, "silu", "vec")
    with pytest.raises(NotImplementedError, match="experts with the activation gelu"):
        torch.ops._C.cpu_fused_moe(*arguments, "gelu", "vec")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expert_parallel", "weights"),
    [(True, (4, 128, 256)), (False, (8, 64, 256))],
    ids=["expert parallel", "tensor parallel"],
)
def test_two_ranks(
    model: Path, expert_parallel: bool, weights: tuple[int, ...], tmp_path: Path
) -> None:
    """Each rank has half of the experts, or half of each; and half of the heads."""
    engine = Engine(
        model,
        settings(40, tmp_path),
        limit_mm_per_prompt={"image": 2, "video": 0},
        tensor_parallel_size=2,
        enable_expert_parallel=expert_parallel,
        worker_extension_cls="support.local_experts.LocalExperts",
    )
    assert engine.llm.collective_rpc("local_experts") == [[weights] * LAYERS] * 2
    oracle = Oracle(model, engine.layout)
    for one in ((TEXT, [1, 2]), (OTHER, [1])):
        (output,) = ask(engine, one)
        assert list(output.outputs[0].token_ids) == routed(oracle, *one)[0]
        kept = {head: positions.numpy() for head, positions in oracle.kept.items()}
        assert_same_kept(load_kept(tmp_path, output.request_id), kept)
    engine.rest()
    engine.core.model_executor.shutdown()
