"""What asks for SPARSEMM on a command line: what vLLM would take for it, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsemm_vllm.engine.frontend.asked import asks_for_us, named_in

ASKED = [
    ["--attention-backend", "SPARSEMM"],
    ["--attention-backend=SPARSEMM"],
    ["--attention_backend", "sparsemm"],
    ["--attention-config", '{"backend": "SPARSEMM"}'],
    ['--attention_config={"backend": "SPARSEMM"}'],
    ["-ac", '{"flash_attn_version": 2, "backend": "SPARSEMM"}'],
    ["-ac.backend", "SPARSEMM"],
    ["-ac.backend=SPARSEMM"],
    ["--attention-config.backend", '"SPARSEMM"'],
    ["--attention-config.backend=SPARSEMM"],
    ["-ac.backend_per_kind.full_attention", "SPARSEMM"],
    ["--attention-config", '{"backend_per_kind": {"full_attention": "SPARSEMM"}}'],
]
NOT_ASKED: list[list[str]] = [
    [],
    ["--served-model-name", "SPARSEMM"],
    ["--served-model-name=sparsemm"],
    ["--download-dir", "/models/SPARSEMM"],
    ["--attention-backend", "FLASH_ATTN", "--served-model-name", "sparsemm"],
    ["-ac.backend", "FLASH_ATTN"],
    ["--additional-config", '{"sparsemm": {"budget": 128}}'],
    ["--additional-config.sparsemm.profile", "none"],
    ["--attention-config", '{"flash_attn_version": 2}'],
]
# Of a configuration file.
FILES = [
    ("attention-backend: SPARSEMM", True),
    ("attention_backend: sparsemm\nseed: 1", True),
    ("attention-config:\n  backend: SPARSEMM", True),
    ("served-model-name: SPARSEMM\nenforce-eager: true\nseed: 1", False),
    ("attention-config:\n  flash_attn_version: 2", False),
]


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """A model whose path has our name in it, offline."""
    (tmp_path / "SPARSEMM").mkdir()
    return ["--model", str(tmp_path / "SPARSEMM")]


def vllm_takes_it_for_us(arguments: list[str]) -> bool:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    return asks_for_us(EngineArgs.from_cli_args(parser.parse_args(arguments)))


@pytest.mark.parametrize("options", [*ASKED, *NOT_ASKED], ids=" ".join)
def test_options_count_as_vllm_reads_them(model: list[str], options: list[str]) -> None:
    arguments = [*model, *options]
    assert named_in(arguments) == vllm_takes_it_for_us(arguments) == (options in ASKED)


@pytest.mark.parametrize(("content", "asked"), FILES)
def test_a_configuration_file_counts(
    model: list[str], tmp_path: Path, content: str, asked: bool
) -> None:
    file = tmp_path / "sparsemm.yaml"
    file.write_text(content)
    arguments = [*model, "--config", str(file)]
    assert named_in(arguments) == vllm_takes_it_for_us(arguments) == asked


@pytest.mark.parametrize("content", [b"\xff", b"a: [", b"- 1", b"", b"a: 2026-01-01", None])
def test_a_file_that_vllm_cannot_read_asks_for_nothing(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    assert not named_in(["serve", "--config", str(file)])
    assert not named_in(["serve", "--config", "x" * 300 + ".yaml"])
    assert not named_in(["serve", "--config"])


def test_other_programs_arguments(tmp_path: Path) -> None:
    """A program that imports vLLM has a command line of its own."""
    values: list[Any] = ["SPARSEMM", "/data/SPARSEMM", json.dumps("SPARSEMM"), "-ac", "-"]
    assert not named_in(values)
    assert named_in([*values, "--attention-backend", "SPARSEMM"])
