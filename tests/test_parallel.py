"""Tensor and pipeline parallel: ranks own slices of the budgets and agree on every block."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_llava

pytestmark = pytest.mark.engine

SERVE = """
import json, sys
from engines import DIGITS, HELLO, ask, settings
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model=sys.argv[1], attention_backend="SPARSEMM", enforce_eager=True, dtype="float32",
        max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=32 << 20,
        limit_mm_per_prompt={"image": 2},
        additional_config={"sparsemm": settings(40, record_kept=sys.argv[2])},
        **json.loads(sys.argv[3]),
    )
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    prompts = [ask(HELLO, 1), ask(DIGITS, 1, 2)]
    for output in llm.generate(prompts, params, use_tqdm=False):
        print("OUT", json.dumps([output.request_id, list(output.outputs[0].token_ids)]))
"""


def serve(model: Path, kept: Path, options: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Tokens of two pictures' prompts from an engine in processes of its own."""
    script = model.parent / "serve.py"
    script.write_text("import sparsemm_vllm\nsparsemm_vllm.use_cpu()\n" + SERVE)
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(kept), json.dumps(options)],
        env=os.environ
        | {
            "PYTHONPATH": str(Path(__file__).parent),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("OUT ")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("parallel") / "model")


@pytest.fixture(scope="module")
def single(model: Path) -> tuple[Path, list[tuple[str, list[int]]]]:
    kept = model.parent / "single"
    return kept, serve(model, kept, {})


@pytest.mark.parametrize(
    "size",
    ["tensor_parallel_size", pytest.param("pipeline_parallel_size", marks=pytest.mark.slow)],
)
def test_two_ranks_answer_as_one(
    model: Path, single: tuple[Path, list[tuple[str, list[int]]]], size: str, tmp_path: Path
) -> None:
    from engines import assert_same_kept

    from sparsemm_vllm.recording import load_kept

    folder, expected = single
    answers = serve(model, tmp_path / "kept", {size: 2})
    assert [tokens for _, tokens in answers] == [tokens for _, tokens in expected]
    for (request, _), (alone, _) in zip(answers, expected, strict=True):
        assert_same_kept(load_kept(tmp_path / "kept", request), load_kept(folder, alone))
    files = [file.name.partition(".")[2] for file in (tmp_path / "kept").iterdir()]
    assert len(set(files)) == 2, "each rank should have written its own slice"
