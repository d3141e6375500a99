"""Time of the kernels beside the time that their bytes take at the measured bandwidth."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import decode_model
import numpy as np
import torch
import triton
from decode_model import COSTS, QWEN, VICUNA, Costs, predict, program_cycles, read_costs
from kernel_cases import relative_error
from sass import DecodeParts, Part
from timed_cases import TINY, Decode, Model, P, Prune, Step

from gpu_parts.device import Cases, Context, Device
from sparsemm_vllm.triton_kernels.decode_batch import SETUP_TILES

NEEDS = 15
MOST_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph

# Cycles where a kernel's machine code was not looked at: beginning an item costs about a tile.
ASSUMED = DecodeParts(*(Part(cycles // 2, cycles) for cycles in (1000, 1600, 600, 400, 1000, 400)))

# What says most first: a run may end anywhere.
STEPS = (
    Step(VICUNA, 8, 256),
    Step(VICUNA, 8),
    Step(VICUNA, 8, 1024),
    Step(VICUNA, 32, 256),
    Step(VICUNA, 1, 256),
    Step(QWEN, 1),
    Step(QWEN, 32, 256),
    Step(QWEN, 8),
    Step(VICUNA, 8, 256, layout="LBNHC"),
    Step(VICUNA, 8, layout="LBNHC"),
    Step(VICUNA, 8, 256, fp8=True),
    Step(VICUNA, 8, fp8=True),
    Step(QWEN, 8, 256),
    Step(QWEN, 32),
    Step(QWEN, 1, n=32768),
    Step(VICUNA, 8, 256, n=32768),
    Step(VICUNA, 1),
    Step(VICUNA, 1, n=32768),
    Step(VICUNA, 32, 1024),
    Step(QWEN, 32, 1024),
    Step(QWEN, 1, 256),
    Step(QWEN, 8, 1024),
    Step(VICUNA, 1, 1024),
    Step(QWEN, 32, 256, fp8=True),
    Step(QWEN, 32, fp8=True),
    Step(QWEN, 1, 1024),
)
DRY_STEPS = (
    Step(TINY, 2, 64, n=200),
    Step(TINY, 2, n=200),
    Step(TINY, 1, 64, n=200, layout="LBNHC"),
    Step(TINY, 1, 64, n=200, fp8=True),
)


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    steps: tuple[Step, ...] = STEPS
    traces: tuple[Step, ...] = (STEPS[0], STEPS[6])
    models: tuple[Model, ...] = (VICUNA, QWEN)  # whose prunes are
    prunes: tuple[int, ...] = (8192, 32768, 4096)
    prune_budget: int = 256
    copied: int = 2 << 30
    gemm: int = 8192
    dtype: torch.dtype = torch.bfloat16


DRY = Sizes(DRY_STEPS, DRY_STEPS[:1], (TINY,), (100,), 64, 1 << 20, 64, torch.float32)


class Predicted(Decode):
    """A decode step, and what the cost model says of it."""

    def first_tiles(self) -> list[np.ndarray]:
        """Of each layer the schedule's running sum of work."""
        end = self.rows.query_tiles * self.model.Hkv + 1
        return list(self.rows.buffers.first_tile[:, :end].cpu().numpy())

    def costs(self) -> Costs:
        """What the kernel's pieces cost, read from its machine code if that is known."""
        options, model = self.rows.options, self.model
        each = max(1, self.rows.programs // self.device.multiprocessors)
        assumed = Costs(ASSUMED, options.block_n, options.num_warps, each, SETUP_TILES)
        known = read_costs() if COSTS.exists() else {}
        kind = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}.get(self.cache.dtype)
        heads = f"{kind} G={model.G}" if model.D == 128 else ""
        compiled = known.get(triton.__version__, {}).get(heads, assumed)
        as_here = (compiled.block_n, compiled.num_warps) == (options.block_n, options.num_warps)
        return replace(compiled, programs_each=each) if as_here else assumed

    def balance(self) -> tuple[float, list[int]]:
        """Cycles of the longest program over their mean, the worst layer's; its items, by layer."""
        costs, worst, items = self.costs(), 0.0, []
        for first_tile in self.first_tiles():
            cycles, _, held = program_cycles(first_tile, self.rows.programs, costs)
            worst = max(worst, float(cycles.max() / cycles.mean()))
            items.append(int(held[cycles.argmax()]))
        return worst, items

    def model_us(self, read: float) -> float | None:
        """Time of a layer as the model predicts it; None if the kernel's costs are not known.

        Args:
            read: bytes that the device reads from memory in a second.
        """
        costs = self.costs()
        if costs.parts is ASSUMED:
            return None
        name = "the device that is measured"
        where = decode_model.Device(name, read, self.device.multiprocessors)
        token_bytes = 2 * self.model.D * self.cache.element_size()
        tokens = self.bytes / token_bytes
        return predict(self.first_tiles(), token_bytes, tokens, costs, where).us

    def flash(self) -> Callable[[], None]:
        """The dense step in vLLM's FlashAttention, on the same cache, as vLLM calls it.

        FlashAttention 3 plans a step once for all layers, as its full CUDA graphs do it.
        """
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2
        _, Hq, D = self.query.shape
        Hkv, dtype = self.model.Hkv, self.cache.dtype
        lengths = {"max_seqlen_q": 1, "cu_seqlens_q": self.start, "max_seqlen_k": self.n + 1}
        shared: dict[str, Any] = {"causal": True} | lengths
        options = shared | {
            "seqused_k": self.seq_lens,
            "softmax_scale": D**-0.5,
            "block_table": self.table,
            "out": self.output,
            "fa_version": version,
        }
        if version == 3:
            shared["num_splits"] = options["num_splits"] = MOST_SPLITS
            options["scheduler_metadata"] = get_scheduler_metadata(
                batch_size=self.batch,
                num_heads_q=Hq,
                num_heads_kv=Hkv,
                headdim=D,
                cache_seqlens=self.seq_lens,
                qkv_dtype=dtype,
                page_size=P,
                **shared,
            )
        query = self.query.to(dtype)  # vLLM's attention layer makes queries of an fp8 cache fp8
        if dtype != self.query.dtype:
            scale = torch.ones(1, device=self.device.torch).expand(self.batch, Hkv)
            options |= {"q_descale": scale, "k_descale": scale, "v_descale": scale}

        def step() -> None:
            for layer in range(self.model.L):
                key, value = self.cache[layer].transpose(1, 2).split(D, -1)
                flash_attn_varlen_func(query, key, value, **options)

        return step


def copy_bandwidth(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    time = device.time(lambda: target.copy_(source))
    return time | {"bytes_per_second": 2e6 * sizes.copied / time["us"]}


def read_bandwidth(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second that a sum reads: decoding reads, and writes next to nothing."""
    source = torch.zeros(sizes.copied // 4, device=device.torch)
    out = torch.empty((), device=device.torch)
    time = device.time(lambda: torch.sum(source, 0, out=out))
    return time | {"bytes_per_second": 1e6 * sizes.copied / time["us"]}


def gemm(device: Device, sizes: Sizes) -> dict[str, Any]:
    """FLOP a second of a square product."""
    a = torch.randn(sizes.gemm, sizes.gemm, device=device.torch).to(sizes.dtype)
    out = torch.empty_like(a)
    time = device.time(lambda: torch.mm(a, a.T, out=out))
    return time | {"flop_per_second": 2e6 * sizes.gemm**3 / time["us"]}


def per_layer(time: dict[str, float], L: int) -> dict[str, float]:
    return {name: value / L for name, value in time.items()}


def decode(context: Context, step: Step) -> dict[str, Any]:
    """A layer's decode, beside what its bytes take, and beside FlashAttention if it is dense."""
    device, sizes, L = context.device, sizes_of(context), step.model.L
    setup = Predicted(device, step, sizes.dtype)
    time = per_layer(device.time(device.graph(setup.step)), L)
    rate = context.results["read bandwidth"]["bytes_per_second"]
    predicted = 1e6 * setup.bytes / rate
    balance, items = setup.balance()
    result = time | {
        "layout": step.layout,
        "dtype": str(setup.cache.dtype).removeprefix("torch."),
        "kept_bytes": setup.bytes,
        "predicted_us": predicted,
        "ratio": time["us"] / predicted,
        "model_us": setup.model_us(rate),
        "balance": balance,
        "most_items": max(items),
        "programs": setup.rows.programs,
        "schedule_us": device.time(device.graph(setup.schedule))["us"],
    }
    if step.budget is None:
        result |= beside_flash(device, setup, time["us"])
    return result


def beside_flash(device: Device, setup: Predicted, us: float) -> dict[str, Any]:
    """FlashAttention's time of the same step, and how far the outputs are apart."""
    if device.dry:
        return {"flash": "skipped: needs a GPU"}
    try:
        flash = setup.flash()
    except ImportError as error:
        return {"flash": f"skipped: {error}"}
    expected = setup.output.clone()  # of the last layer
    times = per_layer(device.time(device.graph(flash)), setup.model.L)
    error = relative_error(expected, setup.output)
    allowed = 2e-2 if setup.cache.dtype == setup.query.dtype else 1e-1  # fp8 queries and weights
    result = {"flash": times, "error": error, "times_flash": us / times["us"]}
    return result | {"differs": not error < allowed}  # a time is worth having even so


def trace(context: Context, step: Step) -> dict[str, Any]:
    """Each layer's kernels in one replay of a decode step: what the profiler sees of them."""
    device = context.device
    setup = Predicted(device, step, sizes_of(context).dtype)
    replay, L = device.graph(setup.step), step.model.L
    found = device.kernels(replay)
    launches = {name: times for name, times in found.items() if len(times) == L}
    assert launches, f"no kernel runs {L} times: { {k: len(v) for k, v in found.items()} }"
    _, items = setup.balance()
    layers = [
        {
            "us": sum(times[layer] for times in launches.values()),
            **{f"{name}_us": times[layer] for name, times in launches.items()},
            "bytes": setup.layer_bytes[layer],
            "most_items": items[layer],
        }
        for layer in range(L)
    ]
    return {"layers": layers, "us_per_layer": sum(each["us"] for each in layers) / L}


def prune(context: Context, model: Model, n: int) -> dict[str, Any]:
    """Scoring, selection and compaction of all layers, beside an estimate of the prefill."""
    device, sizes = context.device, sizes_of(context)
    setup = Prune(device, model, n, sizes.prune_budget, sizes.dtype)
    result: dict[str, Any] = {
        name: device.time(device.graph(partial(setup.run, *steps)))
        for name, steps in (*((step, (step,)) for step in setup.steps), ("all", setup.steps))
    }
    result["flop"] = setup.flop
    result["bytes"] = setup.bytes["scores"] + setup.bytes["compact"]
    copy = context.results["copy bandwidth"]["bytes_per_second"]
    product = context.results["bf16 product"]["flop_per_second"]
    result["predicted_us"] = 1e6 * (result["bytes"] / copy + result["flop"] / product)
    prefill = (2 * model.parameters * n + 2 * model.L * model.Hq * n * n * model.D) / product
    result["prefill_us"] = 1e6 * prefill
    result["share_of_prefill"] = result["all"]["us"] / result["prefill_us"]
    return result


def sizes_of(context: Context) -> Sizes:
    return DRY if context.device.dry else Sizes()


def cases(context: Context) -> Cases:
    """The device's rates first, beside which the others are told; then what says most."""
    device, sizes = context.device, sizes_of(context)
    found: Cases = {
        "copy bandwidth": partial(copy_bandwidth, device, sizes),
        "read bandwidth": partial(read_bandwidth, device, sizes),
        "bf16 product": partial(gemm, device, sizes),
    }
    steps = {step.name: partial(decode, context, step) for step in sizes.steps}
    traces = {
        f"trace of {step.name.removeprefix('decode ')}": partial(trace, context, step)
        for step in sizes.traces
    }
    prunes = {
        f"prune {model.name} n={n}": partial(prune, context, model, n)
        for n in sizes.prunes
        for model in sizes.models
    }
    return found | steps | traces | prunes
