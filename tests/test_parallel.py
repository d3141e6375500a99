"""Tensor, pipeline and data parallel: ranks own slices of the budgets and agree on every block."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

SAID = "OUT", "RANK"
NOT_BOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}

SERVE = """
import json, sys
from engines import DIGITS, HELLO, ask, settings
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model=sys.argv[1], attention_backend="SPARSEMM", enforce_eager=True, dtype="float32",
        max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=32 << 20,
        limit_mm_per_prompt={"image": 2}, worker_extension_cls="rank_view.RankView",
        additional_config={"sparsemm": settings(40, record_kept=sys.argv[2])},
        **json.loads(sys.argv[3]),
    )
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    prompts = [ask(HELLO, 1), ask(DIGITS, 1, 2)]
    for output in llm.generate(prompts, params, use_tqdm=False):
        print("OUT", json.dumps([output.request_id, list(output.outputs[0].token_ids)]))
    for rank in llm.collective_rpc("view"):
        print("RANK", json.dumps(rank))
"""


@dataclass(frozen=True)
class Served:
    """What an engine said.

    Attributes:
        kept: folder of what each rank kept.
        answers: each request's name and tokens.
        ranks: what each rank knows, see `RankView`.
    """

    kept: Path
    answers: list[tuple[str, list[int]]]
    ranks: list[dict[str, Any]]


def serve(model: Path, kept: Path, options: dict[str, Any]) -> Served:
    """Two pictures' prompts in an engine in processes of its own."""
    script = model.parent / "serve.py"
    script.write_text("import sparsemm_vllm\nsparsemm_vllm.use_cpu()\n" + SERVE)
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(kept), json.dumps(options)],
        env=os.environ
        | NOT_BOUND
        | {
            "PYTHONPATH": str(Path(__file__).parent),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    said = {kind: [json.loads(rest) for k, _, rest in lines if k == kind] for kind in SAID}
    return Served(kept, said["OUT"], said["RANK"])


@pytest.fixture(scope="module")
def single(model: Path) -> Served:
    return serve(model, model.parent / "single", {})


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
    from engines import assert_same_kept

    from sparsemm_vllm.recording import load_kept

    two = serve(model, tmp_path / "kept", {size: 2})
    assert [tokens for _, tokens in two.answers] == [tokens for _, tokens in single.answers]
    for (request, _), (alone, _) in zip(two.answers, single.answers, strict=True):
        assert_same_kept(load_kept(two.kept, request), load_kept(single.kept, alone))
    files = [file.name.partition(".")[2] for file in two.kept.iterdir()]
    assert len(set(files)) == 2, "each rank should have written its own slice"

    first, second = two.ranks
    assert [first.pop("own"), second.pop("own")] == slices
    assert first == second, "the ranks disagree on the layout or on a request's blocks"
    assert [n for n, *_ in first["served"]] == [98, 178]
    assert all(compact and freed for _, compact, freed in first["served"])


def test_ranks_agree_with_the_scheduler(single: Served) -> None:
    """The layouts of all ranks are built from the same settings; here by the test."""
    from engines import BLOCK, WINDOW
    from tiny import KV_HEADS, skewed_profile

    from sparsemm_vllm.layout import CacheLayout

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
    import openai
    from engines import serve_options, settings

    from sparsemm_vllm.server import Server

    words = serve_options(settings(40), data_parallel_size="2")
    with Server(str(model), words, tmp_path / "log", NOT_BOUND) as server:
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
        (count,) = re.findall(rf'vllm:prompt_tokens_total{{engine="{engine}".*}} (\S+)', metrics)
        assert float(count) > 0, f"engine {engine} was never asked"
