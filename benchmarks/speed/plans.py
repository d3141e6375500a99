"""What is measured where: 7B models with random weights on a GPU, the bundled model elsewhere."""

import json
from dataclasses import replace

from sparsemm_vllm.reader import READER
from speed.scenarios import Chats, Load, Plan, Scenario, Size

VICUNA, QWEN = "llava-next-vicuna-7b", "qwen2-vl-7b"
# LLaVA-NeXT sees 1,752 and 2,328 tokens in these, with the question some 4,150.
WIDE = ((672, 336), (1008, 336))
SQUARE = ((336, 336),)  # 1,176 tokens of LLaVA-NeXT


# Neither the server's Python nor the client's is to be the limit: pictures are prepared in threads,
# and answers are sent eight tokens at a time after the first.
BOTH = ("--renderer-num-workers", "8", "--stream-interval", "8")


def _options(length: int, sequences: int, *more: str) -> tuple[str, ...]:
    sizes = ("--max-model-len", str(length), "--max-num-seqs", str(sequences))
    return (*sizes, "--limit-mm-per-prompt", '{"image": 2}', *BOTH, *more)


def _gpu_options(length: int) -> tuple[str, ...]:
    """As many sequences as CUDA graphs are captured for, so that memory is the limit."""
    memory = ("--gpu-memory-utilization", "0.9", "--max-num-batched-tokens", "8192")
    return _options(length, 512, "--load-format", "dummy", "--dtype", "bfloat16", *memory)


LONGER = json.dumps({"text_config": {"max_position_embeddings": 8192}})
FLASH = ("--attention-backend", "FLASH_ATTN")
BUDGET = {"budget": 256}

PURPOSES = {
    "unique-512": "prompts of 4K tokens, from light load to more than fits",
    "unique-2048": "long answers, more than fits",
    "shared-512": "8 prompts of pictures asked about again and again: dense requests share blocks",
    "short-16": "ample memory, short answers: nothing to gain",
    "gqa-8k-512": "grouped-query attention, prompts of 8K tokens, more than fits",
    "gqa-short-64": "grouped-query attention, ample memory, short answers: nothing to gain",
    "unique-48": "from light load to more than fits",
    "shared-48": "2 prompts of pictures: dense requests share blocks",
    "short-4": "ample memory, short answers",
}


def _scenario(
    name: str, pictures: tuple[Size, ...], shared: int | None, tokens: int, *loads: Load
) -> Scenario:
    return Scenario(name, PURPOSES[name], pictures, shared, tokens, loads)


GPU = (
    Plan(
        model=VICUNA,
        options=(*_gpu_options(8192), "--hf-overrides", LONGER),
        dense=FLASH,
        sparsemm=BUDGET,
        scenarios=(
            _scenario("unique-512", WIDE, None, 512, Load(0.5, 32), Load(2, 128), Load("inf", 384)),
            _scenario("unique-2048", WIDE, None, 2048, Load("inf", 128)),
            _scenario("shared-512", WIDE, 8, 512, Load("inf", 384)),
            _scenario("short-16", SQUARE, None, 16, Load(2, 64), Load("inf", 256)),
        ),
        chats=Chats(WIDE, 256, 8),
        warm_up=8,
    ),
    Plan(
        model=QWEN,
        options=(*_gpu_options(16384), "--limit-mm-per-prompt", '{"image": 2, "video": 0}'),
        dense=FLASH,
        sparsemm=BUDGET,
        scenarios=(
            _scenario("gqa-8k-512", ((1792, 1792),) * 2, None, 512, Load("inf", 320)),
            _scenario("gqa-short-64", ((1008, 1008),), None, 64, Load(2, 64), Load("inf", 256)),
        ),
        chats=Chats(((1792, 1792),) * 2, 256, 8),
        warm_up=8,
    ),
)

# Two pictures of 196 tokens: 28 blocks of 96 KiB with the question, 31 with the answer. The pool
# holds four such prompts dense, but not their answers. A block is lost to vLLM's null block.
PAIR = ((224, 224),) * 2
POOL = 115 * 96 << 10  # bytes
READERS = Plan(
    model=READER,
    options=_options(
        1024, 16, "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(POOL)
    ),
    dense=(),
    sparsemm={"budget": 64, "window": 16},
    scenarios=(
        _scenario("unique-48", PAIR, None, 48, Load(0.2, 3), Load("inf", 12)),
        _scenario("shared-48", PAIR, 2, 48, Load("inf", 12)),
        _scenario("short-4", PAIR[:1], None, 4, Load("inf", 4)),
    ),
    chats=Chats(PAIR[:1], 48, 2),
    warm_up=1,
)
CPU = (READERS,)


def plans_for(cpu: bool, quick: bool) -> tuple[Plan, ...]:
    """What is measured on such a machine.

    Args:
        cpu: whether there is no GPU.
        quick: the first model's first scenario only, at few requests, lightest and heaviest load.
    """
    plans = CPU if cpu else GPU
    if not quick:
        return plans
    scenario = plans[0].scenarios[0]
    light, heavy = scenario.loads[0], scenario.loads[-1]
    few = (Load(light.rate, 2), Load(heavy.rate, min(heavy.requests, 64)))
    return (replace(plans[0], scenarios=(replace(scenario, loads=few),), chats=None),)
