"""lm-eval's vLLM model with SPARSEMM, on the local task, without a network."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from sparsemm_vllm.processes import serve_environment
from sparsemm_vllm.reader import READER, reader_folder
from support.paths import BENCHMARKS

QUESTIONS = 8
BUDGET = 96

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("lm_eval") and find_spec("ray")),
        reason="lm-eval is not installed: pip install '.[benchmarks]'",
    ),
]


def test_local_task(tmp_path: Path) -> None:
    draw = [sys.executable, str(BENCHMARKS / "draw_questions.py"), "reader"]
    subprocess.run(
        [*draw, "--samples", str(QUESTIONS), "--out", "questions"], cwd=tmp_path, check=True
    )
    kept = tmp_path / "kept"
    model = {
        "pretrained": str(reader_folder()),
        "dtype": "float32",
        "enforce_eager": True,
        "max_images": 1,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "attention_backend": "SPARSEMM",
        "additional_config": {
            "sparsemm": {
                "profile": READER,
                "budget": BUDGET,
                "window": 16,
                "record_kept": str(kept),
            }
        },
    }
    options = {
        "--model": "vllm-vlm",
        "--model_args": json.dumps(model),
        "--tasks": "sparsemm_qa",
        "--include_path": str(BENCHMARKS / "lm_eval_tasks"),
        "--batch_size": "auto",
        "--output_path": "out",
    }
    words = [word for pair in options.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lm_eval", "run", *words, "--apply_chat_template"],
        cwd=tmp_path,
        env=serve_environment()
        | {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
        | {"HF_HOME": str(tmp_path / "hf"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    saved = json.loads(file.read_text())
    assert saved["n-samples"]["sparsemm_qa"]["effective"] == QUESTIONS
    found = saved["results"]["sparsemm_qa"]
    assert found["exact_words,none"] >= 0.75
    assert found["anls,none"] >= 0.75

    records = list(kept.glob("*.npz"))
    assert len(records) == QUESTIONS, "not every prompt was pruned"
    for record in records:
        with np.load(record) as data:
            assert data["lengths"].mean() + 16 <= BUDGET < data["prompt_tokens"]
