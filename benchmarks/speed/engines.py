"""vLLM engines side by side on one device, asked in turn and timed from outside.

What is timed is what a client of `vllm.LLM` sees: with a GPU the engine runs in a process of its
own, with asynchronous scheduling and CUDA graphs, as vLLM does unless told otherwise.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from speed.subject import GIB, Subject
from speed.variants import BLOCK_SIZE, Variant


@dataclass(frozen=True)
class Timing:
    """Times of prompts that were asked at once.

    Attributes:
        first_token_s: time until the first token of the last of them, in seconds.
        step_ms: median time between two tokens of every request, while all of them are decoding,
            in milliseconds.
        held_blocks: KV blocks in use in the last step in which all of them decode.
    """

    first_token_s: float
    step_ms: float
    held_blocks: int


class Engine:
    """A `vllm.LLM` that is timed.

    Args:
        options: options of `vllm.LLM`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**options)
        self._engine: Any = self.llm.llm_engine
        self._asked = 0
        self._usage = 0.0  # share of the pool, in the latest step
        self._watch_statistics()

    @property
    def blocks(self) -> int:
        """Blocks of the pool; one of vLLM's holds nothing."""
        return self._engine.vllm_config.cache_config.num_gpu_blocks - 1

    def _watch_statistics(self) -> None:
        """Look at the statistics that come with every step's tokens."""
        core = self._engine.engine_core
        get_output = core.get_output

        def watched() -> Any:
            outputs = get_output()
            if (stats := outputs.scheduler_stats) is not None:
                self._usage = stats.kv_cache_usage
            return outputs

        core.get_output = watched

    def ask(
        self, prompts: Sequence[list[int]], tokens: int, extra_args: dict[str, Any] | None = None
    ) -> Timing:
        """Answer prompts of token ids at once, greedily, with so many tokens each.

        Raises:
            RuntimeError: if there is no step in which all of them decode.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra_args,
        )
        engine, names = self._engine, []
        begin = time.perf_counter()
        for prompt in prompts:
            names.append(str(self._asked))
            self._asked += 1
            engine.add_request(names[-1], {"prompt_token_ids": prompt}, params)
        counts = dict.fromkeys(names, 0)
        first_token, marks, usage = 0.0, [], 0.0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if not first_token and min(counts.values()):
                first_token = now - begin
            elif first_token and outputs and max(counts.values()) < tokens:
                marks.append((now, sum(counts.values())))
                usage = self._usage
        if tokens > 1 and len(marks) < 2:
            raise RuntimeError(f"{len(prompts)} requests of {tokens} tokens never decode together")
        return Timing(
            first_token_s=first_token,
            step_ms=_step_ms(marks, len(prompts)),
            held_blocks=round(usage * self.blocks),
        )

    def close(self) -> None:
        """End its process, if it has one of its own."""
        self._engine.engine_core.shutdown()


def engine_options(
    subject: Subject, variant: Variant, budgets: dict[str, int], gib: float, **options: Any
) -> dict[str, Any]:
    """Options of `vllm.LLM` for a variant.

    Args:
        subject: model that is served.
        variant: way to serve it.
        budgets: budgets among the settings of SPARSEMM, in tokens; dense variants have none.
        gib: size of the block pool, in GiB.
        options: further options, by name.
    """
    settings = {"profile": subject.profile, "method": variant.method, "window": subject.window}
    own = {"additional_config": {"sparsemm": settings | budgets}} if variant.method else {}
    common = {
        "model": str(subject.folder),
        "attention_backend": variant.backend,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": round(gib * GIB),
        "limit_mm_per_prompt": {"image": 0},
        "disable_log_stats": False,
        "seed": 0,
    }
    return common | own | variant.options | options


def _step_ms(marks: list[tuple[float, int]], requests: int) -> float:
    """Median time for a token of every request."""
    steps = [
        1e3 * (end - begin) * requests / (after - before)
        for (begin, before), (end, after) in pairwise(marks)
        if after > before
    ]
    return median(steps) if steps else 0.0


def random_prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts that share no block, of ids that are no special tokens."""
    rng = random.Random(seed)
    low = 100 if vocabulary > 1000 else 0
    return [[rng.randrange(low, vocabulary - 10) for _ in range(tokens)] for _ in range(count)]
