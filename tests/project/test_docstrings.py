"""What `make lint` refuses in docstrings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

SCRIPT = ROOT / ".ci" / "check_docstrings.py"


def check(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def found(path: Path) -> list[tuple[int, str]]:
    """Line and name of each finding."""
    return [
        (int(line), name)
        for line, name in re.findall(r"^[^:\n]+:(\d+): (\w+):", check(path).stdout, re.MULTILINE)
    ]


def described(folder: Path, text: str) -> Path:
    file = folder / "function.py"
    file.write_text(f'def f(rank):\n    """Do it.\n\n    Args:\n        rank: {text}\n    """\n')
    return file


@pytest.mark.parametrize(
    "text",
    [
        "of the request.",
        "among the tensor-parallel ones.",
        "that this step completes.",
        "how many there are.",
        "what SPARSEMM does in it.",
        "give what heads cannot use to the others.",
        "vLLM's.",
        "vLLM's, by name.",
        "`W`.",
        "`W`, in tokens.",
        "int32 ``[R, max_blocks]``.",
        "int64 ``[T]``, in tokens.",
        "0 keeps the prompt whole.",
        "one of `METHODS`.",
        "this one.",
        "those of the queries.",
        "the ones before.",
        "held by the request.",
        "generated.",
        "rank.",
        "",
    ],
)
def test_a_line_without_a_noun_is_refused(text: str, tmp_path: Path):
    result = check(described(tmp_path, text))
    assert result.returncode == 1
    assert "function.py:5: " in result.stdout


@pytest.mark.parametrize(
    "text",
    [
        "tensor-parallel rank, from 0.",
        "the request's rank.",
        "this request's rank.",
        "whether it is the first.",
        "held blocks.",
        "seed of the scores.",
        "observation window `W`, in tokens.",
        "``[L, Hkv]`` tokens of each head.",
        "int32 ``[R]`` lengths, in tokens.",
        "`EngineCoreOutputs` of each API server.",
        "vLLM's layer.",
        "32-bit registers.",
    ],
)
def test_a_line_with_a_noun_is_fine(text: str, tmp_path: Path):
    result = check(described(tmp_path, text))
    assert result.returncode == 0, result.stdout


def test_names_that_are_not_there_and_parameters_left_out(tmp_path: Path):
    file = tmp_path / "names.py"
    file.write_text(
        '''
from dataclasses import dataclass, field


def f(a, *b, c=1, **d):
    """Do it.

    Args:
        a: first number.
        b: more numbers.
        old: number that was renamed.
        d: options.

    Raises:
        ValueError: of no interest here.
    """


def passes_on(a, *args, **kwargs):
    """Call it.

    Args:
        a: number.
    """


@dataclass
class Base:
    x: int


@dataclass
class Fields(Base):
    """Numbers.

    Args:
        x: number of the base.
        y: number of this class.
        made: number that the constructor does not take.
    """

    y: int
    z: int
    made: int = field(init=False)


class Made:
    """Numbers.

    Args:
        a: number.

    Attributes:
        b: number.
        c: number that was renamed.
    """

    def __init__(self, a):
        self.b = a

    def f(self, a):
        """Do it.

        Args:
            self: object.
            a: number.
        """

    @staticmethod
    def g(a):
        """Do it.

        Args:
            a: number.
        """
'''
    )
    assert found(file) == [(9, "c"), (11, "old"), (37, "z"), (39, "made"), (55, "c"), (65, "self")]


SUBCLASS = """
from vllm.v1.kv_cache_interface import FullAttentionSpec


class SparseMMSpec(FullAttentionSpec):
    @classmethod
    def merge(cls, specs):
        return specs[0]
{mark}
    def max_num_blocks_per_req(self, vllm_config, max_len):
        return 1

    def of_ours(self):
        return 1
"""


@pytest.mark.parametrize(
    ("mark", "names"), [("", ["merge", "max_num_blocks_per_req"]), ("\n    @override", ["merge"])]
)
def test_an_override_of_vllm_must_say_so(mark: str, names: list[str], tmp_path: Path):
    file = tmp_path / "sparsemm_vllm" / "engine" / "spec.py"
    file.parent.mkdir(parents=True)
    file.write_text(SUBCLASS.format(mark=mark))
    assert [name for _, name in found(file)] == names


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    assert check(tmp_path / "gone").returncode == 1
