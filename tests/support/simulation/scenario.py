"""What an engine is started with: settings of a seed, and vLLM's configuration of them."""

import copy
import random
from dataclasses import dataclass, field
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from vllm.config import KVEventsConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from sparsemm_vllm.engine import patches
from sparsemm_vllm.engine.config import Serving, pruned_layers
from sparsemm_vllm.engine.spec import SparseMMSpec
from support import tiny

W, BASE, P = 8, 16, 16
MAX_LEN, MAX_SEQS, STEP_TOKENS, DRAFTS = 400, 24, 120, 3
SLIDING = 32  # of Gemma's other layers


@dataclass(frozen=True)
class Scenario:
    """What an engine is started with.

    Attributes:
        groups: KV cache groups: 1 of full attention, or 2, one with a sliding window.
        asynchronous: whether vLLM schedules before it knows the last tokens.
        stages: stages of the pipeline: as many steps are in flight, one more if asynchronous.
        queue: steps in flight, if not so many.
        drafts: tokens that are drafted for each request at most.
        policy: order of scheduling, of vLLM's `SchedulerConfig`.
        spare: blocks beyond those that the largest request needs.
        share: `prune_when_free_below`.
        encoder: embeddings that the encoder cache holds, and that a step may compute.
        threshold: `long_prefill_token_threshold`.
        events: whether vLLM says what the prefix cache holds.
        scheduling: further fields of vLLM's `SchedulerConfig`.
        faulty: probability of a fault at each place where one may happen.
        fails_at: step in which the device fails, if any.
    """

    groups: int = 1
    asynchronous: bool = False
    stages: int = 1
    queue: int | None = None
    drafts: int = 0
    policy: str = "fcfs"
    spare: int = 20
    share: float | None = None
    encoder: tuple[int, int] = (80, 48)
    threshold: int = 0
    events: bool = False
    scheduling: dict[str, Any] = field(default_factory=dict)
    faulty: float = 0.02
    fails_at: int | None = None

    @classmethod
    def of_seed(cls, seed: int) -> "Scenario":
        rng = random.Random(seed)
        asynchronous = rng.random() < 0.6
        stages = rng.choice([1, 1, 2, 3])
        # Without asynchronous scheduling vLLM would draft from tokens that are still in flight.
        drafts = DRAFTS if (asynchronous or stages == 1) and rng.random() < 0.5 else 0
        groups = 2 if stages < 3 and rng.random() < 0.3 else 1
        deep = asynchronous and stages == groups == 1
        return cls(
            groups=groups,
            asynchronous=asynchronous,
            stages=stages,
            queue=rng.choice([None, 3, 4]) if deep else None,
            drafts=drafts,
            policy=rng.choice(["fcfs", "priority", "priority"]),
            spare=rng.choice([0, 0, 1, 3, 8, 25]),
            share=rng.choice([None, None, 0.2, 0.5]),
            encoder=rng.choice([(40, 40), (40, 48), (48, 48), (160, 80)]),
            threshold=rng.choice([0, 0, W, 30]),
            faulty=rng.choice([0.0, 0.01, 0.03]),
            fails_at=rng.randrange(20, 200) if rng.random() < 0.08 else None,
        )


@cache
def _model_folder(groups: int) -> TemporaryDirectory:
    """A model's configuration, until the process ends."""
    folder = TemporaryDirectory(prefix="simulation-")
    config = tiny.text_config() if groups == 1 else tiny.gemma3_config()
    config.architectures = ["LlamaForCausalLM" if groups == 1 else "Gemma3ForCausalLM"]
    config.save_pretrained(folder.name)
    return folder


@cache
def _base_config(groups: int, drafts: int) -> Any:
    load_general_plugins()
    patches.install()
    settings = {
        "budget": W + BASE,
        "window": W,
        "profile": tiny.skewed_profile().model_dump(mode="json"),
    }
    ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}
    return EngineArgs(
        model=_model_folder(groups).name,
        skip_tokenizer_init=True,
        attention_backend="SPARSEMM",
        additional_config={"sparsemm": settings},
        dtype="float32",
        block_size=P,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=True,
        speculative_config=ngram if drafts else None,
    ).create_engine_config()


def make_config(scenario: Scenario) -> Any:
    """vLLM's configuration; what the CPU platform would switch off is set afterwards."""
    config = copy.deepcopy(_base_config(scenario.groups, scenario.drafts))
    config.scheduler_config.async_scheduling = scenario.asynchronous
    config.scheduler_config.policy = scenario.policy
    config.scheduler_config.long_prefill_token_threshold = scenario.threshold
    if scenario.events:
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    for name, value in scenario.scheduling.items():
        assert hasattr(config.scheduler_config, name)
        setattr(config.scheduler_config, name, value)
    config.parallel_config.pipeline_parallel_size = scenario.stages
    config.parallel_config.world_size = scenario.stages
    assert config.use_v2_model_runner
    assert config.max_concurrent_batches == scenario.stages + scenario.asynchronous
    return config


def layer_specs(config: Any, share: float | None) -> dict[str, Any]:
    """KV cache specs of all layers, by name."""
    shape = {
        "block_size": P,
        "num_kv_heads": tiny.KV_HEADS,
        "head_size": tiny.HEAD_SIZE,
        "dtype": torch.float32,
    }
    serving = Serving.of(config)
    pruned = SparseMMSpec(
        **shape, layout=serving.layout, prune_when_free_below=share, limits=serving.limits
    )
    sliding = SlidingWindowSpec(**shape, sliding_window=SLIDING)
    full = pruned_layers(config.model_config)
    return {
        f"model.layers.{layer}.self_attn.attn": pruned if layer in full else sliding
        for layer in range(tiny.LAYERS)
    }


def least_blocks(config: Any, specs: dict[str, Any]) -> int:
    """Blocks that the largest request needs, and the one that holds nothing."""
    groups = {type(spec): spec for spec in specs.values()}.values()
    return 1 + sum(s.max_memory_usage_bytes(config) // s.page_size_bytes for s in groups)
