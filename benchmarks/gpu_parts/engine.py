"""One vLLM engine in a process of its own: ``python -P -m gpu_parts.engine JOB RESULT``.

The job, as JSON:

* ``dry``: on the CPU;
* ``options``: of `vllm.LLM`; ``settings``: of SPARSEMM, none for dense attention;
* ``rounds``: each with the ``prompts`` as token ids, the steps between their arrivals (``every``)
  and the ``tokens`` to generate, greedily.

The result: seconds to start, the graph mode and blocks that vLLM chose, and of each round the
answers, whether every block was free afterwards, and the decode throughput.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sparsemm_vllm.files import write_json


def main(job_path: Path, result_path: Path) -> None:
    job = json.loads(job_path.read_text())
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is within reach
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # answers are greedy; FlashInfer need not be there
    }
    if job["dry"]:
        import sparsemm_vllm

        sparsemm_vllm.use_cpu()
        from gpu_parts.device import imitate_gpu_machine

        imitate_gpu_machine()
    from vllm import LLM
    from vllm.model_executor.model_loader import dummy_loader

    dummy_loader.initialize_single_dummy_weight = functools.partial(initialize, [0])
    begin = time.monotonic()
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "seed": 0} | job["options"]
    if job["settings"] is not None:
        options |= {"additional_config": {"sparsemm": job["settings"]}}
    llm = LLM(**options)
    config = llm.llm_engine.vllm_config
    result: dict[str, Any] = {
        "start_seconds": time.monotonic() - begin,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "backend": backends(config),
        "blocks": config.cache_config.num_gpu_blocks,
        "rounds": [run(llm, **each) for each in job["rounds"]],
    }
    write_json(result_path, result)


def initialize(count: list[int], parameter: Any, *args: Any, **kwargs: Any) -> None:
    """Weights of a model that says something: vLLM's own are next to nothing, and all alike.

    Activations keep their size from layer to layer; norms and scales are 1. Logits, of which bf16
    keeps 8 bits, are small. It stands in vLLM's place, whose releases give it more arguments.

    Args:
        count: number of matrices that were made before, as the only entry; it counts on.
        parameter: weights to fill.
        args: other arguments of vLLM's, of no consequence here.
        kwargs: other arguments of vLLM's by name, of no consequence here.
    """
    import torch

    if parameter.device.type == "meta" or not torch.is_floating_point(parameter):
        return
    if parameter.dim() < 2:
        parameter.data.fill_(1)
        return
    count[0] += 1
    rows, columns = parameter.shape[0], parameter[0].numel()
    inner = (0.5 if rows >= 30000 else 1.3) * columns**-0.5
    size = 1.0 if count[0] == 1 else inner  # the embedding comes first
    generator = torch.Generator(parameter.device).manual_seed(count[0])
    parameter.data.normal_(0, size, generator=generator)


def backends(config: Any) -> list[str]:
    """Of the attention layers."""
    layers = config.compilation_config.static_forward_context.values()
    found = {layer.get_attn_backend().get_name() for layer in layers}
    return sorted(found)


def run(llm: Any, prompts: list[list[int]], every: int, tokens: int) -> dict[str, Any]:
    """Prompts that arrive every few steps, or all at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=tokens, temperature=0, logprobs=2, ignore_eos=True, detokenize=False
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    waiting = {str(i): prompt for i, prompt in enumerate(prompts)}
    outputs: dict[str, Any] = {}
    step, held = 0, 0
    marks: list[tuple[float, int]] = []  # time and tokens while all requests are decoding
    while waiting or engine.has_unfinished_requests():
        while waiting and (not every or step >= every * (len(prompts) - len(waiting))):
            name = next(iter(waiting))
            engine.add_request(name, {"prompt_token_ids": waiting.pop(name)}, params)
        for output in engine.step():
            outputs[output.request_id] = output
        step += 1
        held = max(held, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        counts = [len(output.outputs[0].token_ids) for output in outputs.values()]
        if len(counts) == len(prompts) and max(counts) < tokens:
            marks.append((time.perf_counter(), sum(counts)))
    for _ in range(5):  # scheduled ahead, for requests that have ended
        if pool.get_num_free_blocks() < pool.num_gpu_blocks - 1:
            engine.step()
    result: dict[str, Any] = {
        "answers": [answer(outputs[str(i)]) for i in range(len(prompts))],
        "most_blocks": held,
        "idle": pool.get_num_free_blocks() == pool.num_gpu_blocks - 1,
        "steps": step,
    }
    if layout := getattr(manager, "layout", None):
        result["pruned"] = sum(layout.is_pruned(len(prompt)) for prompt in prompts)
    if len(marks) > 1:
        (start, first), (end, last) = marks[0], marks[-1]
        result["tokens_per_second"] = (last - first) / (end - start)
        result["step_ms"] = 1e3 * (end - start) / (len(marks) - 1)
    return result


def answer(output: Any) -> dict[str, list[Any]]:
    """Tokens, their log-probabilities, and how far the best is ahead of the second."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    ranked = [sorted((p.logprob for p in s.values()), reverse=True) for s in completion.logprobs]
    return {
        "tokens": tokens,
        "logprobs": [s[t].logprob for s, t in zip(completion.logprobs, tokens, strict=True)],
        "gaps": [best[0] - best[1] for best in ranked],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
