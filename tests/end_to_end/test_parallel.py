"""Tensor, pipeline and data parallel: ranks own slices of the budgets and agree on every block."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.client import metric
from sparsemm_vllm.commands.server import Server
from sparsemm_vllm.engine.worker.probes.kept import load_kept
from support.engines import (
    BLOCK,
    DIGITS,
    HELLO,
    WINDOW,
    Answer,
    Engine,
    ask,
    assert_same_kept,
    serve_options,
    settings,
)
from support.tiny import KV_HEADS, make_llama, skewed_profile

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Served:
    """What an engine said.

    Attributes:
        kept: folder of what each rank kept.
        answers: to two prompts with pictures, and to one with a budget of its own.
        ranks: what each rank knows of the first two, see `RankView`.
    """

    kept: Path
    answers: list[Answer]
    ranks: list[dict[str, Any]]


def serve(model: Path, kept: Path, **options: Any) -> Served:
    """The scheduler in this process; workers have their own if there are several."""
    engine = Engine(
        model,
        settings(40, kept),
        limit_mm_per_prompt={"image": 2},
        worker_extension_cls="support.rank_view.RankView",
        **options,
    )
    answers = engine.generate(ask(HELLO, 1), ask(DIGITS, 1, 2), max_tokens=16)
    ranks = engine.llm.collective_rpc("view")
    answers += engine.generate(ask(HELLO, 3), max_tokens=16, extra_args={"sparsemm_budget": 60})
    engine.rest()
    if options:
        engine.core.model_executor.shutdown()  # or its processes outlive this one's log
    return Served(kept, answers, ranks)


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(model, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize(
    ("size", "slices"),
    [
        ("tensor_parallel_size", [[[0, 4], [0, 2]], [[0, 4], [2, 4]]]),
        pytest.param(
            "pipeline_parallel_size",
            [[[0, 2], [0, 4]], [[2, 4], [0, 4]]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_answer_as_one(
    model: Path, single: Served, size: str, slices: list[Any], tmp_path: Path
) -> None:
    two = serve(model, tmp_path / "kept", **{size: 2})
    for answer, alone in zip(two.answers, single.answers, strict=True):
        assert answer.tokens == alone.tokens
        assert_same_kept(
            load_kept(two.kept, answer.request_id), load_kept(single.kept, alone.request_id)
        )
    files = [file.name.partition(".")[2] for file in two.kept.iterdir()]
    assert len(set(files)) == 2, "each rank should have written its own slice"

    first, second = two.ranks
    assert [first.pop("own"), second.pop("own")] == slices
    assert first == second, "the ranks disagree on the layout or on a request's blocks"
    assert [n for n, *_ in first["served"]] == [98, 178]
    assert all(compact and freed for _, compact, freed in first["served"])


@pytest.mark.slow
def test_batch_sharded_sampling(tmp_path: Path) -> None:
    """Each rank samples for some of the requests; vLLM has it for text models, not for LLaVA."""
    model = make_llama(tmp_path / "model")
    prompts = [{"prompt_token_ids": [5 + k * i % 90 for i in range(100)]} for k in (1, 3, 7)]
    answers = []
    for options in ({}, {"tensor_parallel_size": 2, "enable_batch_sharded_sampling": True}):
        engine = Engine(
            model, settings(40), worker_extension_cls="support.rank_view.RankView", **options
        )
        ranks = engine.llm.collective_rpc("shards_sampling")
        assert ranks == ([True, True] if options else [False])
        answers.append([answer.tokens for answer in engine.generate(*prompts, max_tokens=16)])
        engine.rest()
    engine.core.model_executor.shutdown()
    assert answers[0] == answers[1]


def test_ranks_agree_with_the_scheduler(single: Served) -> None:
    """The layouts of all ranks are built from the same settings; here by the test."""
    scores = skewed_profile().tensor()
    layout = CacheLayout.from_scores(scores, KV_HEADS, 40, WINDOW, largest_budget=80)
    (rank,) = single.ranks
    assert rank["layout"] == repr(layout)
    for n, compact, freed in rank["served"]:
        assert compact == layout.compact_blocks(n, BLOCK)
        assert freed == layout.freed_blocks(n, BLOCK)


def test_heads_that_do_not_divide_are_refused_by_vllm(model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    options = {"distributed_executor_backend": "mp", "tensor_parallel_size": 3}
    with pytest.raises(ValueError, match=r"attention heads \(8\) must be divisible by .* \(3\)"):
        EngineArgs(model=str(model), attention_backend="SPARSEMM", **options).create_engine_config()


@pytest.mark.slow
def test_data_parallel_engines_serve_alike(model: Path, tmp_path: Path) -> None:
    """`vllm serve --data-parallel-size 2`: both engines answer, and answer the same."""
    words = serve_options(settings(40), data_parallel_size="2")
    with Server(str(model), words, tmp_path / "log") as server:
        server.wait_until_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def ask(_: int) -> str:
            text = "a prompt without a picture that is longer than what is kept of it"
            answer = client.completions.create(
                model="tiny", prompt=text, temperature=0, max_tokens=16
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(8)))
        metrics = httpx.get(f"{server.url}/metrics").text
    assert len(set(answers)) == 1
    for engine in "01":
        asked = metric(metrics, "vllm:prompt_tokens_total", engine=engine)
        assert asked > 0, f"engine {engine} was never asked"
