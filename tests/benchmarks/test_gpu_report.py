"""benchmarks/report.py gpu: records of GPU runs are kept, merged, drawn and told; all made up."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import report
from gpu_report import archive, plots
from gpu_report.archive import ArchiveError
from gpu_report.readme import NOTHING, readme_table
from gpu_report.rows import decodes, dense_us, pairs, times_faster
from typer.testing import CliRunner

from sparsemm_vllm.environment import CPU_VARIABLES
from support.gpu_records import (
    BENCH,
    DAY,
    FOLDER,
    KERNELS,
    LATER,
    MACHINE,
    PAIR,
    READ,
    first_run,
    pack,
    record,
    second_run,
    step,
)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Calls the command and gives its exit status and output."""

    def call(*arguments: Any) -> tuple[int, str]:
        words = ["gpu", *map(str, arguments), "--results", str(tmp_path / "results")]
        done = CliRunner().invoke(report.app, words)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return call


def kept(tmp_path: Path, part: str) -> dict[str, Any]:
    return json.loads((tmp_path / "results" / FOLDER / f"{part}.json").read_text())


# What is kept


@pytest.mark.parametrize("kind", ["tar", "gz", "xz"])
def test_a_tar_becomes_a_folder_of_its_device_and_day(tmp_path: Path, run: Any, kind: str) -> None:
    assert run(first_run(tmp_path, kind)) == (0, f"{tmp_path / 'results' / FOLDER}/summary.md\n")
    names = {file.name for file in (tmp_path / "results" / FOLDER).iterdir()}
    assert names == {
        *("bench.json", "kernels.json", "tune.json", "summary.md", "bytes.png", "prediction.png")
    }
    bench = kept(tmp_path, "bench")
    assert bench["machines"] == [MACHINE]
    name = "decode toy-7b B=256 batch=8"
    assert bench["cases"][name] == BENCH[name] | {"commit": MACHINE["commit"]}
    assert bench["complete"]
    assert not kept(tmp_path, "kernels")["complete"]


def test_a_folder_is_as_good_as_a_tar(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "brought"
    with tarfile.open(first_run(tmp_path)) as tar:
        tar.extractall(folder, filter="data")
    assert run(folder)[0] == 0
    assert kept(tmp_path, "bench")["cases"].keys() == BENCH.keys()


@pytest.mark.parametrize("together", [True, False])
def test_runs_of_a_day_add_up(tmp_path: Path, run: Any, together: bool) -> None:
    """Told in one call or in two, and twice as well as once."""
    runs = [[first_run(tmp_path), second_run(tmp_path)]]
    for files in runs if together else [[file] for file in runs[0] * 2]:
        assert run(*files)[0] == 0
    kernels = kept(tmp_path, "kernels")
    assert [m["commit"] for m in kernels["machines"]] == [MACHINE["commit"], LATER["commit"]]
    assert len(kernels["cases"]) == 3
    assert kernels["cases"]["dtype=fp32 D=128"]["commit"] == LATER["commit"]
    assert kernels["cases"]["dtype=bf16 D=64"]["commit"] == MACHINE["commit"]
    (failure,) = kernels["failed"]
    assert failure["case"] == "dtype=fp32 D=128", "what failed once stays on the list"
    assert not kernels["complete"]
    assert kept(tmp_path, "pair")["cases"]["dense"]["rounds"][0]["requests"] == 8
    assert "answers" not in (tmp_path / "results" / FOLDER / "pair.json").read_text()


def test_a_finished_part_counts_more_than_what_was_left_before(tmp_path: Path) -> None:
    done, half = record("bench", BENCH), record("bench", {}, total=99)
    found = archive.read(pack(tmp_path / "r.tar", {"bench.partial.json": half, "bench.json": done}))
    assert found.parts["bench"]["total"] == len(BENCH)
    assert found.parts["bench"]["complete"]


def test_records_deeper_down_are_other_parts(tmp_path: Path) -> None:
    """Cases under the sanitizer are not measurements."""
    own = record("kernels", KERNELS)
    file = pack(tmp_path / "r.tar", {"x/kernels.json": own, "x/sanitizer/kernels.json": own})
    assert archive.read(file).parts.keys() == {"kernels", "sanitizer-kernels"}


@pytest.mark.parametrize("fact", ["device", "driver", "torch", "triton", "cuda", "commit"])
@pytest.mark.parametrize("value", [None, "unknown"])
def test_figures_of_an_unknown_machine_are_refused(
    tmp_path: Path, run: Any, fact: str, value: str | None
) -> None:
    bench = record("bench", BENCH, machine=MACHINE | {fact: value})
    status, said = run(pack(tmp_path / "r.tar", {"bench.json": bench}))
    assert status == 1
    assert f"bench does not say its {fact}" in said.replace("\n", "")
    assert not (tmp_path / "results").exists()


def test_a_part_that_never_began_has_the_machine_of_the_others(tmp_path: Path) -> None:
    broken = record("pair", {}, failed={"the part itself": "ImportError: no vllm"})
    del broken["machine"]
    documents = {"pair.partial.json": broken, "bench.json": record("bench", BENCH)}
    found = archive.read(pack(tmp_path / "r.tar", documents))
    assert found.parts["pair"]["machines"] == [MACHINE]
    with pytest.raises(ArchiveError, match="pair does not say its device"):
        archive.read(pack(tmp_path / "s.tar", {"pair.partial.json": broken}))


def test_a_file_without_records(tmp_path: Path, run: Any) -> None:
    (tmp_path / "no.tar").write_text("no tar")
    assert run(tmp_path / "no.tar")[0] == 1
    status, said = run(pack(tmp_path / "r.tar", {"a.json": {"part": 1}, "b.json": [1]}))
    assert status == 1
    assert "no record of a part" in said


def test_a_damaged_file_is_told(tmp_path: Path, run: Any) -> None:
    file = pack(tmp_path / "r.tar", {"bench.json": record("bench", BENCH), "tune.json": "{"})
    assert run(file)[0] == 0
    text = (tmp_path / "results" / FOLDER / "summary.md").read_text()
    assert "* r.tar: tune.json is damaged" in text


def test_dry_runs_are_kept_apart(tmp_path: Path, run: Any) -> None:
    dry = record("bench", BENCH, dry_run=True, machine=MACHINE | {"device": "CPU", "driver": None})
    file = pack(tmp_path / "r.tar", {"bench.json": dry})
    status, said = run(file)
    assert status == 1
    assert "a dry run measures nothing" in said
    assert run(file, "--dry-run")[0] == 0
    folder = tmp_path / "results" / "dry-run-cpu" / "2031-05-06"
    assert "the figures mean nothing" in (folder / "summary.md").read_text()
    assert readme_table(tmp_path / "results", tmp_path / "R.md") == [NOTHING]
    status, said = run(first_run(tmp_path), "--dry-run")
    assert status == 1
    assert "leave out --dry-run" in said


def test_results_of_a_cpu_are_none_of_a_gpu(tmp_path: Path, run: Any) -> None:
    """Even if they do not call themselves a dry run."""
    cpu = record("bench", BENCH, machine=MACHINE | {"device": "CPU"})
    assert run(pack(tmp_path / "r.tar", {"bench.json": cpu}))[0] == 0
    assert readme_table(tmp_path / "results", tmp_path / "R.md") == [NOTHING]


def test_the_suites_own_records(tmp_path: Path, run: Any) -> None:
    """What gpu_suite.py writes today is what is read here."""
    script = Path(report.ROOT) / "benchmarks" / "gpu_suite.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "out")]
    own = {key: value for key, value in os.environ.items() if key not in CPU_VARIABLES}
    done = subprocess.run(
        [*command, "--dry-run", "--parts", "methods"], env=own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "out", "--dry-run")[0] == 0
    (file,) = (tmp_path / "results" / "dry-run-cpu").glob("*/summary.md")
    assert "| methods | 2 of 2 | 0 | complete |" in file.read_text()


# What is told


@pytest.fixture
def told(tmp_path: Path, run: Any) -> str:
    """The summary of both runs."""
    assert run(first_run(tmp_path), second_run(tmp_path))[0] == 0
    return (tmp_path / "results" / FOLDER / "summary.md").read_text()


def row(text: str, name: str) -> list[str]:
    """Cells of the row that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_summary_says_what_is_missing(told: str) -> None:
    assert "| kernels | 3 of 4 | 1 | **partial** |" in told
    assert "| bench | 14 of 14 | 0 | complete |" in told
    assert "commit c0ffeec0ffee; passed in another run): `AssertionError: sparse_decode" in told
    assert "* not measured: kernels: dtype=fp32 D=64" in told
    assert "* skipped: tune, too large: out of registers" in told
    assert "* first.tar.gz: job ncu: killed after 316 s" in told
    assert told.count("| 1.2.3 | 99.1 | 9.9.0 | 7.7.7 |") == 2, "a row for each commit"


def test_the_summary_tells_the_figures(told: str) -> None:
    own = row(told, "toy-7b B=256 batch=8")
    assert own[1:4] == ["LBHNC", "25.0 (22.5 to 30.0)", "40.0"]
    assert own[4:8] == ["20.0", "1.25", "23.8", "1.25"]
    assert own[8:] == ["-", "20.00", "10.40"], "500 and 260 us of FlashAttention"
    assert row(told, "toy-7b B=256 batch=1")[8:] == ["-", "-", "-"], "no dense one of this batch"
    assert row(told, "sparsemm")[1:] == ["5.00", "1,600.0", "8", "300", "2.50", "1.60"]
    assert row(told, "toy-7b n=8192")[1:] == ["0.90", "0.50", "0.30", "0.10", "1.25 %"]
    assert row(told, "sparse_decode | 1.0e-02")[2:] == ["5.0e-03", "2"]
    assert row(told, "pair: budget over prompt")[3:9] == [
        *("90 of 96", "1", "1.0e-03", "2.0e-03", "9.0e-03", "2.0e-02")
    ]
    assert "* read bandwidth: 2,000.0 GB/s" in told
    assert row(told, "Duration")[1:] == ["12.50 us", "-"]
    assert told.index("| fast |") < told.index("| slow |")
    for picture in ("bytes", "prediction", "steps"):
        assert f"![{picture}]({picture}.png)" in told


def test_fields_may_be_missing(tmp_path: Path, run: Any) -> None:
    bench = {"decode toy-7b B=256 batch=8": {"us": 3.0}, "decode toy-7b dense batch=8": {"us": 4.0}}
    unknown = {"one": {"stalls": {"a": 1}, "percent": 12.3456, "said": "a|b"}}
    documents = {"bench.json": record("bench", bench), "stalls.json": record("stalls", unknown),
                 "pair.json": record("pair", {"dense": {"rounds": []}})}  # fmt: skip
    for document in documents.values():
        del document["names"]
    assert run(pack(tmp_path / "r.tar", documents))[0] == 0
    text = (tmp_path / "results" / FOLDER / "summary.md").read_text()
    assert "stalls (1 entries), percent 12.35, said a/b" in text
    assert row(text, "toy-7b B=256 batch=8")[1:3] == ["-", "3.0 (3.0 to 3.0)"]


def test_the_honest_baseline_is_the_faster_dense_one() -> None:
    rows = decodes({"bench": {"cases": BENCH}})
    assert dense_us(rows, ("toy-7b", 8192, 8)) == {"dense": 500.0, "dense-fp8": 260.0}
    assert dense_us(rows, ("toy-gqa", 32768, 1)) == {"dense": 20.0}
    assert times_faster(10.0, [500.0, 260.0]) == 26
    assert times_faster(10.0, [None, 260.0]) == 26
    assert times_faster(10.0, []) is None
    assert list(pairs({"pair": {"cases": PAIR}})) == list(report.COLOURS)[:4]


def test_the_readmes_table(tmp_path: Path, run: Any) -> None:
    assert readme_table(report.RESULTS, report.README)
    assert run(first_run(tmp_path), second_run(tmp_path))[0] == 0
    lines = readme_table(tmp_path / "results", tmp_path / "README.md")
    text = "\n".join(lines)
    name = "whole decode step, toy-7b, 8 requests of 8,192 tokens, B = 256"
    assert row(text, name)[1:] == [*("12.50 ms", "8.00 ms", "5.00 ms", "4.00 ms", "1.60", "2.00")]
    name = "attention of a layer, toy-7b, 8 x 8,192 tokens, B = 256"
    assert row(text, name)[1:] == ["500.0 us", "260.0 us", "25.0 us", "20.0 us", "10.40", "13.00"]
    assert f"({(Path('results') / FOLDER / 'summary.md').as_posix()})" in text
    assert "driver 1.2.3" in text
    assert "**Partial**: kernels." in text
    assert "toy-7b, 32 x" not in text, "no dense one to compare with"
    assert "commit c0ffeec0ffee, decadedecade, 2031-05-06" in text
    assert "failed" not in text, "it passed in the second run"


def test_the_newest_day_of_a_device_stands_in_the_readme(tmp_path: Path, run: Any) -> None:
    for year in (2031, 2030):
        day = DAY.replace(year=year)
        cases = {"decode toy-7b B=256 batch=8": step(40, float(year))}
        cases["decode toy-7b dense batch=8"] = step(1000, 520.0, 500.0)
        run(pack(tmp_path / f"{year}.tar", {"bench.json": record("bench", cases)}, day))
    text = "\n".join(readme_table(tmp_path / "results", tmp_path / "README.md"))
    assert "2,031.0 us" in text
    assert "2,030.0 us" not in text


def test_the_readme_picks_no_times(tmp_path: Path, run: Any) -> None:
    """SPARSEMM's are of the layout that is served; FlashAttention's count, whatever it answers."""
    cases = BENCH | {"decode toy-7b B=256 batch=8 LBNHC": step(40, 1.0, layout="LBNHC")}
    fp8 = "decode toy-7b dense batch=8 fp8"
    cases[fp8] = cases[fp8] | {"differs": True}
    assert run(pack(tmp_path / "r.tar", {"bench.json": record("bench", cases)}))[0] == 0
    text = "\n".join(readme_table(tmp_path / "results", tmp_path / "README.md"))
    name = "attention of a layer, toy-7b, 8 x 8,192 tokens, B = 256"
    assert row(text, name)[2:4] == ["260.0 us", "25.0 us"]
    assert "FlashAttention's output is another in: toy-7b dense batch=8 fp8." in text


def test_failures_stand_in_the_readme(tmp_path: Path, run: Any) -> None:
    assert run(first_run(tmp_path))[0] == 0
    text = "\n".join(readme_table(tmp_path / "results", tmp_path / "README.md"))
    assert "**Cases that failed: 1.**" in text


# Pictures


def test_pictures(tmp_path: Path) -> None:
    parts = {"bench": {"cases": BENCH}, "pair": {"cases": PAIR}}
    files = plots.draw(parts, "Made-Up GPU", tmp_path)
    assert files.keys() == {"bytes", "prediction", "steps"}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files.values())
    assert plots.draw({"tune": {"cases": {}}}, "Made-Up GPU", tmp_path) == {}


def test_the_floor_is_what_the_device_reads() -> None:
    rows = decodes({"bench": {"cases": BENCH}})
    figure = plots.draw_bytes(rows, {"read bandwidth": READ}, "Made-Up GPU")
    lines = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    (floor,) = lines
    megabytes, us = floor.get_data()
    assert list(us) == pytest.approx([1e12 * each / READ for each in megabytes])


def test_nothing_to_compare_with(tmp_path: Path, run: Any) -> None:
    """The kernels were timed, but FlashAttention was not."""
    cases = {name: case for name, case in BENCH.items() if "dense" not in name}
    assert run(pack(tmp_path / "r.tar", {"bench.json": record("bench", cases)}))[0] == 0
    (line, _) = readme_table(tmp_path / "results", tmp_path / "README.md")
    assert line.endswith("Nothing in it can be compared with dense.")


def test_a_machines_folders_are_left_out(tmp_path: Path) -> None:
    """What lies behind them says something elsewhere too."""
    text = 'File "/tmp/x-1/bundle/vllm/llm.py", line 3\n/opt/e/site-packages/torch/a.py: broken'
    broken = record("pair", {}, failed={"dense": text})
    found = archive.read(pack(tmp_path / "r.tar", {"pair.partial.json": broken}))
    (failed,) = found.parts["pair"]["failed"]
    assert failed["error"] == 'File "bundle/vllm/llm.py", line 3\nsite-packages/torch/a.py: broken'
