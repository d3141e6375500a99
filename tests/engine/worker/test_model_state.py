"""Which steps a worker plans for vLLM's batches, and which requests it takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from vllm.config.compilation import CUDAGraphMode

from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.worker.model_state import DefaultModelState, SparseMMModelState
from sparsemm_vllm.engine.worker.probes.attention import AttentionRecorder
from support.steps import BASE, LAYOUT, MAX_REQUESTS, W, make_state


def worker(state, **limits):
    """A model state that has only what planning needs."""
    worker = object.__new__(SparseMMModelState)
    worker._state = state
    limits = RequestLimits(W, 2 * (W + BASE), **limits)
    worker._serving = Serving(Settings(), state.layout, limits)
    return worker


def vllm_batch(rows, prompt_lens):
    requests, computed, queries = (np.array(column) for column in zip(*rows, strict=True))
    return SimpleNamespace(
        idx_mapping_np=requests,
        query_start_loc_np=np.concatenate([[0], np.cumsum(queries)]),
        seq_lens_cpu_upper_bound=torch.from_numpy(computed + queries),
        prefill_len_np=np.array(prompt_lens),
        num_scheduled_tokens=queries,
        num_reqs=len(rows),
        num_reqs_after_padding=len(rows) + 2,
    )


def test_a_decode_graph_never_stands_for_a_step_that_prunes():
    model_state = worker(make_state([100]))
    ends = vllm_batch([(0, 100 - W, W)], [100])
    with pytest.raises(RuntimeError, match="decode graph for a step that prunes"):
        model_state._plan(ends, CUDAGraphMode.FULL, for_capture=False)
    assert model_state._plan(ends, CUDAGraphMode.PIECEWISE, for_capture=False).prunes
    decodes = vllm_batch([(0, 100, 1)], [100])
    assert model_state._plan(decodes, CUDAGraphMode.FULL, for_capture=False).short_rows == 3
    assert model_state._plan(decodes, CUDAGraphMode.NONE, for_capture=False).short_rows == 1


def test_batches_that_stand_for_none():
    """Memory profiling has no step; a capture has one that belongs to no request."""
    model_state = worker(make_state([100]))
    dummy = vllm_batch([(0, 0, 1), (1, 0, 1)], [0, 0])
    assert model_state._plan(dummy, CUDAGraphMode.NONE, for_capture=False) is None
    step = model_state._plan(dummy, CUDAGraphMode.FULL, for_capture=True)
    assert step.short_rows == 2
    assert not step.moves_slots


@pytest.mark.parametrize(
    "extra_args",
    [{"sparsemm_budget": 10**6}, {"sparsemm_budget": "x"}, {"sparsemm": [1]}, {"sparsemm_x": 1}],
)
def test_a_worker_takes_the_servers_settings_for_what_cannot_be(monkeypatch, extra_args):
    """The scheduler has replaced them; a worker that believed a client would place other pages."""
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    model_state = worker(make_state())
    params = SimpleNamespace(extra_args=extra_args, max_tokens=1)
    new = SimpleNamespace(prompt_len=100, sampling_params=params, req_id="a", prompt_token_ids=[1])
    model_state.add_request(3, new)
    assert model_state._state.layouts[3] is LAYOUT


def test_a_recording_that_cannot_be_does_not_end_the_worker(monkeypatch):
    said = []
    monkeypatch.setattr(
        "sparsemm_vllm.engine.worker.model_state.logger.error",
        lambda text, *a: said.append(text % a),
    )
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    state = make_state()
    state.attention = AttentionRecorder(3, 4, 2, 16, 8, MAX_REQUESTS, DEVICE)
    model_state = worker(state, recorded=8)
    params = SimpleNamespace(extra_args={"sparsemm_record": [0, 9]}, max_tokens=1)
    model_state.add_request(0, SimpleNamespace(prompt_len=5, sampling_params=params, req_id="a"))
    assert said == [
        "SPARSEMM: request a: sparsemm_record [0, 9]: the last 9 queries of 5, from row 0 of 8 on"
    ]
