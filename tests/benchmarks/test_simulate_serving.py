"""A reduced trace through vLLM's scheduler, dense and pruned; benchmarks/simulate_serving.py."""

import pytest
from simulated.serving import (
    MAX_SEQS,
    Simulation,
    Trace,
    decode_cpu,
    make_config,
    make_scheduler,
)

from sparsemm_vllm.engine.config import Serving

BUDGET, DENSE_REQUESTS = 256, 20


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("model"), BUDGET, seed=0)


def test_all_finish_none_starves_and_more_run_at_once(vllm_config):
    trace = Trace.random(150, seed=1)
    blocks, layout = trace.blocks(DENSE_REQUESTS), Serving.of(vllm_config).layout
    reports = {}
    for name, own in (("dense", None), ("sparsemm", layout)):
        run = Simulation(make_scheduler(vllm_config, blocks, own), trace, own).run()
        assert sorted(run.finished) == list(range(150))
        assert run.admitted == list(range(150)), "in the order in which they came"
        assert run.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1
        reports[name] = run.report()
    dense, sparse = reports["dense"], reports["sparsemm"]
    assert max(r["most_preemptions_of_a_request"] for r in reports.values()) <= 10
    assert DENSE_REQUESTS * 0.7 < dense["mean_running"] < DENSE_REQUESTS * 1.5
    assert sparse["mean_running"] > 2 * dense["mean_running"]
    assert sparse["makespan_s"] < 0.8 * dense["makespan_s"]


def test_the_schedulers_cpu_time(vllm_config):
    """At most 1.2 times dense, for a full batch of decoding requests that take turns."""
    found = decode_cpu(vllm_config, Serving.of(vllm_config).layout, steps=60)
    assert found["dense"]["median_ms"] > 0.1, f"{MAX_SEQS} requests take longer than that"
    assert found["ratio"] < 1.2
