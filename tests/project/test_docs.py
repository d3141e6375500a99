"""Pages name files that exist, and the picture of the code has all of its rooms."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "sparsemm_vllm"
ENGINE = PACKAGE / "engine"
PICTURE = (ROOT / "docs" / "architecture.svg").read_text("utf-8")
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    ROOT / "head_profiles" / "README.md",
    ROOT / "benchmarks" / "instrument" / "README.md",
    PACKAGE / "reader" / "README.md",
]
TOP = "sparsemm_vllm|triton_kernels|head_profiles|benchmarks|tests|docs"
NEXT_RELEASE = "vllm-0.34.json"  # an example of a file that is to be made


def missing(names: list[str], *folders: Path) -> list[str]:
    return [name for name in names if not any((folder / name).exists() for folder in folders)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path):
    named = re.findall(rf"(?<![\w/.-])(?:{TOP})/[\w./-]*[\w/]", page.read_text("utf-8"))
    assert not missing([name for name in named if NEXT_RELEASE not in name], ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert not missing(links, page.parent)


def test_files_of_the_architecture_page_exist():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"`([\w/.-]+(?:/|\.py|\.md|\.json))`", text)
    assert len(named) > 30
    assert not missing(named, ROOT, PACKAGE, ENGINE, ROOT / "triton_kernels")


def heights() -> dict[str, int]:
    """Where each room stands in the picture, from the top."""
    in_line = re.findall(r'<text x="\d+" y="(\d+)"><tspan class="name">([^<]*)<', PICTURE)
    above = re.findall(r'<text class="name" x="\d+" y="(\d+)">([^<]*)<', PICTURE)
    return {name: int(y) for y, names in in_line + above for name in names.split(", ")}


def rooms(folder: Path) -> set[str]:
    found = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    return found | {path.name for path in folder.glob("*.py")} - {"__init__.py"}


def test_every_room_is_in_the_picture():
    outside = {"triton_kernels/", "head_profiles/"}
    assert set(heights()) == rooms(PACKAGE) | rooms(ENGINE) | outside


@pytest.mark.parametrize("container", ["sparsemm_vllm", "sparsemm_vllm.engine"])
def test_the_picture_has_the_order_of_the_contracts(container: str):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    [layers] = [c["layers"] for c in contracts if c.get("containers") == [container]]
    height = {name.strip("/").removesuffix(".py"): y for name, y in heights().items()}
    rows = [[height[room] for room in layer.split(" | ")] for layer in layers]
    for above, below in pairwise(rows):
        assert max(above) < min(below)
