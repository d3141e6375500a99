"""What happened in a step rides to the API server in the statistics that vLLM sends."""

from typing import Any

from sparsemm_vllm.engine.scheduler.manager import find_manager
from sparsemm_vllm.names import OTHERS, OURS, PRUNE_SECONDS


def send(scheduler: Any, runner_output: Any, outputs: dict[int, Any]) -> None:
    """Put what happened in a step into the statistics that the step sends, if it sends any.

    Args:
        scheduler: scheduler of the engine.
        runner_output: output of the model runner for this step.
        outputs: `EngineCoreOutputs` of each API server.
    """
    manager = find_manager(scheduler.kv_cache_manager)
    if manager is None:
        return
    manager.stats.end_others(scheduler.requests)
    for output in outputs.values():
        if (stats := output.scheduler_stats) is not None:
            ours = manager.stats.drain(sum(map(len, manager.req_to_blocks.values())))
            pool = manager.block_pool
            ours["pool_blocks"] = pool.num_gpu_blocks - 1  # vLLM keeps one that holds nothing
            ours["free_blocks"] = pool.get_num_free_blocks()
            ours["prune_seconds"] = getattr(runner_output, PRUNE_SECONDS, 0.0)
            stats.ec_connector_stats = {OURS: ours, OTHERS: stats.ec_connector_stats}
