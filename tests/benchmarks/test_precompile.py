"""Triton's cache for another machine: made in one folder, found in another."""

import json
import sys
import tarfile
from pathlib import Path

import precompile
import pytest
import triton

from support.children import compiling, python

FACTS = {"triton": "3.6.0", **precompile.compiler_facts()}


def archive_of(folder: Path, facts: dict) -> Path:
    """An archive of one made-up kernel, beside files that need not travel."""
    kernel = folder / "cache" / "KEY"
    kernel.mkdir(parents=True)
    for kind in ("cubin", "json", "ptx", "source"):
        (kernel / f"decode.{kind}").write_text(kind)
    (kernel / "__grp__decode.json").write_text("{}")
    archive = folder / "archive.tar.xz"
    assert precompile.pack(folder / "cache", archive, facts) == 1
    return archive


def test_an_archive_is_unpacked_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = archive_of(tmp_path, FACTS)
    assert precompile.archived_kernels(archive) == {"KEY"}
    elsewhere = tmp_path / "elsewhere"
    precompile.unpack(archive, elsewhere)
    assert capsys.readouterr().out == "1 kernels, as this Triton looks for them\n"
    files = {name: str(elsewhere / "KEY" / name) for name in ("decode.cubin", "decode.json")}
    group = json.loads((elsewhere / "KEY" / "__grp__decode.json").read_text())
    assert group == {"child_paths": files}
    assert sorted(path.name for path in elsewhere.iterdir()) == ["KEY"]


def test_another_triton_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = archive_of(tmp_path, FACTS | {"libtriton": 64 * "0"})
    precompile.unpack(archive, tmp_path / "elsewhere")
    said = capsys.readouterr().out
    assert "1 kernels, of no use: another libtriton\n" in said
    assert f"libtriton: '{64 * '0'}' there" in said


def test_what_a_run_compiled_travels_back(tmp_path: Path) -> None:
    """Kernels and launchers of a run's results; nothing else of them."""
    results = tmp_path / "results.tar.gz"
    for name in ("triton/OTHER/sample.cubin", "triton/OTHER/sample.json", "bench.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "triton" / "STUB").mkdir()
    (tmp_path / "triton" / "STUB" / "launcher.so").write_text("code")
    with tarfile.open(results, "w:gz") as tar:
        for name in ("triton", "bench.json"):
            tar.add(tmp_path / name, name)
    cache = tmp_path / "cache"
    precompile.add_results(results, cache)
    assert sorted(path.name for path in cache.iterdir()) == ["OTHER", "STUB"]
    archive = tmp_path / "archive.tar.xz"
    assert precompile.pack(cache, archive, FACTS) == 1
    warm = tmp_path / "warm"
    precompile.unpack(archive, warm)
    assert (warm / "STUB" / "launcher.so").read_text() == "code"
    group = json.loads((warm / "OTHER" / "__grp__sample.json").read_text())
    assert set(group["child_paths"]) == {"sample.cubin", "sample.json"}


def test_no_archive_costs_only_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precompile.unpack(tmp_path / "none.tar.xz", tmp_path / "cache")
    assert "there is no none.tar.xz" in capsys.readouterr().out
    assert precompile.archived_kernels(tmp_path / "none.tar.xz") == set()


def test_wheels_are_found_by_their_python(tmp_path: Path) -> None:
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    names = [f"triton-3.6.0-{python}-{python}-any.whl" for python in {own, "cp312"}]
    for name in [*names, "triton-3.5.0-cp312-cp312-any.whl"]:
        (tmp_path / name).touch()
    found = precompile.wheels([tmp_path], tmp_path)
    assert {python: path.name for python, path in found.items()} == {
        name.split("-")[2]: name for name in names
    }


def test_a_launch_is_found_again(tmp_path: Path) -> None:
    """Compiled under another library's hash; a fresh process finds all, under its own none."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "triton").symlink_to(Path(triton.__file__).parent)
    pattern = "^kernels smoke dtype=bf16 D=128 P=16 G=1 Q=1 layout=LBHNC$"
    cache, other = tmp_path / "cache", 64 * "a"
    cold = precompile.compile_all(site, cache, other, 1, pattern)
    assert cold["misses"] > 5
    archive = tmp_path / "archive.tar.xz"
    assert precompile.pack(cache, archive, FACTS) == cold["misses"]
    warm = tmp_path / "warm"
    precompile.unpack(archive, warm)
    again = precompile.compile_all(site, warm, other, 1, pattern)
    assert again == {"hits": cold["hits"] + cold["misses"], "misses": 0}
    with tarfile.open(archive) as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".json", ".cubin"}
    own = precompile.compile_all(site, warm, str(FACTS["libtriton"]), 1, pattern)
    assert own["misses"] == cold["misses"]


def test_the_engines_and_timings_are_compiled_too() -> None:
    """The names of all launches, in a process in which Triton is not the interpreter."""
    code = "import precompiled_launches as p; print(*p.cases(), sep='\\n')"
    done = python("-c", code, environment=compiling())
    assert done.returncode == 0, done.stderr
    names = done.stdout.splitlines()
    for begin in ("kernels smoke", "kernels dtype=fp32", "engine small", "engine vicuna-7b B=1024"):
        assert any(name.startswith(begin) for name in names), begin
    for begin in ("bench decode qwen2-vl-7b dense", "bench prune", "tune vicuna-7b"):
        assert any(name.startswith(begin) for name in names), begin
    assert not any("bandwidth" in name or "trace" in name for name in names)
