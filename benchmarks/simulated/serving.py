"""The same trace through vLLM's scheduler and block pool, dense and pruned, without a model."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models.head_scores import synthetic_profile
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.spec import SparseMMSpec

L, H, D, P = 32, 32, 128, 16  # as many KV heads as query heads
MAX_LEN, MAX_SEQS, STEP_TOKENS = 16_896, 256, 8_192
WEIGHT_BYTES, PARAMETERS = 13.5e9, 6.74e9
BANDWIDTH, FLOPS = 4.3e12, 790e12  # of an H200, as measured: bytes and FLOP in a second
TOKEN_BYTES = L * H * 2 * D * 2


@dataclass(frozen=True)
class Trace:
    """Requests that all wait from the start, in this order: tokens of prompts and answers."""

    prompts: tuple[int, ...]
    answers: tuple[int, ...]

    @classmethod
    def random(cls, requests: int, seed: int) -> "Trace":
        """Prompts of 500 to 16,000 tokens, evenly, and answers of 50 to 400."""
        rng = np.random.default_rng(seed)
        prompts = rng.integers(500, 16_001, requests)
        return cls(tuple(prompts.tolist()), tuple(rng.integers(50, 401, requests).tolist()))

    def blocks(self, dense_requests: int) -> int:
        """A pool that holds so many of them, of mean size, and the block that holds nothing."""
        mean = (sum(self.prompts) + sum(self.answers)) / len(self.prompts)
        return 1 + max(round(dense_requests * mean / P), -(-MAX_LEN // P) * 2)


def make_config(folder: Path, budget: int, seed: int, max_seqs: int = MAX_SEQS) -> Any:
    """A vLLM configuration of a model that is never loaded."""
    config = LlamaConfig(
        hidden_size=H * D,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=H,
        max_position_embeddings=MAX_LEN,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    profile = synthetic_profile("a model of the size of Vicuna-7B", L, H, H, seed)
    load_general_plugins()
    init_none_hash(sha256)
    settings = {"budget": budget, "profile": profile.model_dump(mode="json")}
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        attention_backend="SPARSEMM",
        additional_config={"sparsemm": settings},
        block_size=P,
        max_model_len=MAX_LEN,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=STEP_TOKENS,
    ).create_engine_config()


def make_scheduler(vllm_config: Any, blocks: int, layout: CacheLayout | None) -> Scheduler:
    """vLLM's own with an empty pool; dense without a layout."""
    shape = {"block_size": P, "num_kv_heads": H, "head_size": D, "dtype": torch.bfloat16}
    spec = SparseMMSpec(**shape, layout=layout) if layout else FullAttentionSpec(**shape)
    vllm_config.cache_config.num_gpu_blocks = blocks
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(L)]
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
    )
    structured = StructuredOutputManager(vllm_config)
    return Scheduler(vllm_config, config, structured, block_size=P, log_stats=True)


class Simulation:
    """A trace on its way through a scheduler."""

    def __init__(self, scheduler: Scheduler, trace: Trace, layout: CacheLayout | None) -> None:
        self.scheduler = scheduler
        self.kept = lru_cache(maxsize=None)(layout.mean_kept) if layout else float
        self.seconds = 0.0
        self.running_seconds = 0.0  # integral of the running requests
        self.steps = self.most_running = 0
        self.cpu: list[float] = []
        self.admitted: list[int] = []
        self.finished: list[int] = []
        self.preemptions: Counter[str] = Counter()
        hasher = get_request_block_hasher(P, sha256)
        for index, (n, answer) in enumerate(zip(trace.prompts, trace.answers, strict=True)):
            params = SamplingParams(max_tokens=answer, ignore_eos=True)
            # One token over and over, another one for each request: nothing is shared.
            tokens = [index + 1] * n
            request = Request(str(index), tokens, params, None, block_hasher=hasher)
            scheduler.add_request(request)

    def step(self) -> None:
        """Schedule, let time pass, and hand out a token to every request that samples one."""
        scheduler, before = self.scheduler, time.process_time()
        output = scheduler.schedule()
        cpu = time.process_time() - before
        spans = {}
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            spans[name] = (request, request.num_computed_tokens - count, count)
        assert spans, "requests wait and nothing can be scheduled"
        for new in output.scheduled_new_reqs:
            preemptions = scheduler.requests[new.req_id].num_preemptions
            self.preemptions[new.req_id] = preemptions
            if not preemptions:
                self.admitted.append(int(new.req_id))
        names = list(spans)
        sampled = [[] if spans[name][0].is_prefill_chunk else [7] for name in names]
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
        took = step_seconds(list(spans.values()), self.kept)
        running = len(scheduler.running)
        before = time.process_time()
        scheduler.update_from_output(output, result)
        self.cpu.append(cpu + time.process_time() - before)
        self.finished += [int(name) for name in names if name not in scheduler.requests]
        self.steps += 1
        self.seconds += took
        self.running_seconds += took * running
        self.most_running = max(self.most_running, running)

    def run(self) -> "Simulation":
        """Until the last request has finished."""
        while self.scheduler.has_unfinished_requests():
            self.step()
        return self

    def report(self) -> dict[str, Any]:
        """Figures of a finished run."""
        return {
            "finished": len(self.finished),
            "steps": self.steps,
            "makespan_s": round(self.seconds, 2),
            "mean_running": round(self.running_seconds / self.seconds, 1),
            "most_running": self.most_running,
            "preemptions": sum(self.preemptions.values()),
            "most_preemptions_of_a_request": max(self.preemptions.values()),
            "admitted_in_order": self.admitted == sorted(self.admitted),
            "scheduler_cpu_s": round(sum(self.cpu), 1),
        }


def step_seconds(spans: list[tuple[Request, int, int]], kept: Callable[[int], float]) -> float:
    """Floor of a step's time: its bytes over the bandwidth or its FLOP over the peak.

    Args:
        spans: requests, each with its tokens before the step and in it.
        kept: function from a prompt's tokens to those that a head keeps on average.
    """
    total_bytes, flop = WEIGHT_BYTES, 0.0
    for request, start, count in spans:
        n, end = request.num_prompt_tokens, start + count
        held = kept(n) + end - n if start >= n else float(end)
        total_bytes += held * TOKEN_BYTES
        if end == n and kept(n) < n:
            total_bytes += n * TOKEN_BYTES / 2  # the prune reads all keys once more
        flop += count * (2 * PARAMETERS + 4 * held * L * H * D)
    return max(total_bytes / BANDWIDTH, flop / FLOPS)


def decode_cpu(vllm_config: Any, layout: CacheLayout, steps: int) -> dict[str, Any]:
    """CPU time of the scheduler for a step of `MAX_SEQS` decoding requests, dense and pruned.

    Both take turns, so that whatever else the machine does meets both alike, and the ratio is the
    median of those of neighbours.
    """
    trace = Trace((700,) * MAX_SEQS, (steps + 200,) * MAX_SEQS)
    blocks = MAX_SEQS * (1_000 + steps) // P
    runs = {
        name: Simulation(make_scheduler(vllm_config, blocks, own), trace, own)
        for name, own in (("dense", None), ("sparsemm", layout))
    }
    for run in runs.values():
        while run.steps < 20 or any(r.is_prefill_chunk for r in run.scheduler.running):
            run.step()
        assert len(run.scheduler.running) == MAX_SEQS
        run.cpu.clear()
    for _ in range(steps):
        for run in runs.values():
            run.step()
    found: dict[str, Any] = {}
    for name, run in runs.items():
        low, median, high = np.percentile(run.cpu, [20, 50, 80]) * 1e3
        found[name] = {"p20_ms": low, "median_ms": median, "p80_ms": high}
    found["ratio"] = np.median(np.divide(runs["sparsemm"].cpu, runs["dense"].cpu))
    return json.loads(json.dumps(found), parse_float=lambda x: round(float(x), 3))


def simulate(requests: int, dense_requests: int, budget: int, seed: int) -> dict[str, Any]:
    """Run a trace both ways."""
    trace = Trace.random(requests, seed)
    blocks = trace.blocks(dense_requests)
    with tempfile.TemporaryDirectory() as folder:
        vllm_config = make_config(Path(folder), budget, seed)
    layout = Serving.of(vllm_config).layout
    document: dict[str, Any] = {
        "requests": requests,
        "prompt_tokens": [min(trace.prompts), max(trace.prompts)],
        "answer_tokens": [min(trace.answers), max(trace.answers)],
        "pool_blocks": blocks,
        "block_size": P,
        "budget": budget,
        "max_num_seqs": MAX_SEQS,
        "step_tokens": STEP_TOKENS,
        "seed": seed,
    }
    for name, own in (("dense", None), ("sparsemm", layout)):
        simulation = Simulation(make_scheduler(vllm_config, blocks, own), trace, own).run()
        pool = simulation.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == blocks - 1, "blocks are held by nobody"
        document[name] = simulation.report()
    dense, sparse = document["dense"], document["sparsemm"]
    document["times_the_requests_at_once"] = round(
        sparse["mean_running"] / dense["mean_running"], 2
    )
    document["times_faster"] = round(dense["makespan_s"] / sparse["makespan_s"], 2)
    document["decode_step_cpu"] = decode_cpu(vllm_config, layout, steps=200)
    return document
