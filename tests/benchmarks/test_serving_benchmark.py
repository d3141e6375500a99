"""benchmarks/serving.py without its servers: what is asked, watched, resumed and reported."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import serving
from PIL import Image
from speed.load import LoadError, arguments
from speed.plans import CPU, GPU, plans_for
from speed.results import Deadline, Results
from speed.scenarios import QUESTION, Chats, Load, Plan, Scenario, write_requests
from speed.side_by_side import beside
from speed.variants import FOUR
from transformers import AutoProcessor, AutoTokenizer

from sparsemm_vllm.reader import READER, reader_folder

SMALL = ((48, 32), (30, 45))
UNIQUE = Scenario("unique", "its own pictures", SMALL, None, 8, (Load(0.5, 2), Load("inf", 5)))
SHARED = Scenario("shared", "shared pictures", SMALL, 2, 8, (Load("inf", 5),))
PLAN = Plan("model", ("--max-num-seqs", "4"), (), {"budget": 64}, (UNIQUE, SHARED), None, 1)
SERVERS = ("dense", "sparsemm")
TWO = (PLAN, replace(PLAN, model="other", chats=Chats(SMALL, 4, 2), scenarios=(SHARED,)))


# What is asked


def written(folder: Path, scenario: Scenario, load: Load) -> list[tuple[tuple[bytes, ...], str]]:
    """Of each request its pictures and its text."""
    file = write_requests(folder, scenario, load)
    requests = []
    for line in file.read_text().splitlines():
        *images, text = json.loads(line)["content"]
        assert [part["type"] for part in images] == ["image"] * len(scenario.pictures)
        requests.append((tuple(Path(p["image"]).read_bytes() for p in images), text["text"]))
    return requests


def test_unique_pictures_are_never_repeated(tmp_path: Path) -> None:
    light, heavy = (written(tmp_path / str(load.rate), UNIQUE, load) for load in UNIQUE.loads)
    assert (len(light), len(heavy)) == (2, 5)
    pictures = [picture for pair, _ in light + heavy for picture in pair]
    assert len(set(pictures)) == len(pictures) == 14
    assert [text for _, text in heavy] == [QUESTION.format(i) for i in range(5)]


def test_shared_pictures_are_asked_about_in_turn(tmp_path: Path) -> None:
    requests = written(tmp_path, SHARED, SHARED.loads[0])
    pairs = [pair for pair, _ in requests]
    assert len(set(pairs)) == 2
    assert pairs == [pairs[0], pairs[1], pairs[0], pairs[1], pairs[0]]
    assert len({text for _, text in requests}) == 5, "the questions differ"


def test_both_servers_are_asked_the_same(tmp_path: Path) -> None:
    one, other = (written(tmp_path / name, UNIQUE, UNIQUE.loads[1]) for name in "ab")
    assert one == other


def test_pictures_have_their_sizes(tmp_path: Path) -> None:
    file = write_requests(tmp_path, UNIQUE, UNIQUE.loads[0])
    parts = json.loads(file.read_text().splitlines()[0])["content"]
    assert tuple(Image.open(part["image"]).size for part in parts[:2]) == SMALL


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the model of a plan lies."""
    folder = tmp_path_factory.mktemp("models")
    return lambda name: reader_folder() if name == READER else models.prepare(name, folder)


def prompt_tokens(folder: Path, scenario: Scenario, scratch: Path) -> int:
    """Of a scenario's first request, as transformers counts them."""
    file = write_requests(scratch, replace(scenario, shared=1), Load("inf", 1))
    *images, text = json.loads(file.read_text())["content"]
    content = [*({"type": "image"} for _ in images), text]
    processor = AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    pictures = [Image.open(part["image"]) for part in images]
    return len(processor(images=pictures, text=prompt, add_special_tokens=False)["input_ids"][0])


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("unique-512", 4096, 4200),
        ("short-16", 1176, 1280),
        ("gqa-8k-512", 8192, 8300),
        ("gqa-short-64", 1296, 1450),
        ("unique-48", 400, 460),
        ("short-4", 200, 260),
    ],
)
def test_prompts_have_the_lengths_that_they_are_named_for(
    tmp_path: Path, folder_of: Callable[[str], Path], name: str, least: int, most: int
) -> None:
    (plan, scenario), *_ = [(p, s) for p in CPU + GPU for s in p.scenarios if s.name == name]
    tokens = prompt_tokens(folder_of(plan.model), scenario, tmp_path)
    assert least <= tokens <= most
    longest = max(s.output_tokens for s in plan.scenarios if s.pictures == scenario.pictures)
    assert tokens + longest <= int(plan.options[plan.options.index("--max-model-len") + 1])


def test_vllm_reads_the_arguments_and_the_requests(tmp_path: Path) -> None:
    from vllm.benchmarks.datasets import get_samples
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    requests, load = write_requests(tmp_path, SHARED, SHARED.loads[0]), SHARED.loads[0]
    out = tmp_path / "result.json"
    words = arguments("http://127.0.0.1:1", reader_folder(), requests, SHARED, load, out)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(words)
    assert (args.request_rate, args.temperature, args.seed) == (float("inf"), 0, 0)
    assert args.ignore_eos
    assert args.save_result
    assert args.num_warmups == 0, "it would warm up with a request that is measured"
    sampled = get_samples(args, AutoTokenizer.from_pretrained(reader_folder()))
    assert [sample.expected_output_len for sample in sampled] == [8] * 5
    for number, sample in enumerate(sampled):
        (message,) = sample.prompt
        *images, text = message["content"]
        assert text["text"] == QUESTION.format(number)
        names = [image["image_url"]["url"].rpartition("/")[2] for image in images]
        assert names == [f"{number % 2}-0.png", f"{number % 2}-1.png"]


# What servers are started with


def test_servers_differ_in_their_attention_only(tmp_path: Path) -> None:
    dense, own = (
        serving.server_options(GPU[0], server, tmp_path, tmp_path)
        for server in ("dense", "sparsemm")
    )
    assert dense[-2:] == ["--attention-backend", "FLASH_ATTN"]
    assert own[:-4] == dense[:-2]
    assert own[-4:-1] == ["--attention-backend", "SPARSEMM", "--additional-config"]
    assert json.loads(own[-1]) == {"sparsemm": {"budget": 256}}
    (tmp_path / "profile.json").touch()
    own = serving.server_options(GPU[0], "sparsemm", tmp_path, tmp_path)
    assert json.loads(own[-1])["sparsemm"]["profile"] == str(tmp_path / "profile.json")


@pytest.mark.parametrize("server", ["dense", "sparsemm"])
def test_fp8_is_one_option_more(tmp_path: Path, server: str) -> None:
    """The memory is the same, so its blocks are more."""
    plain, fp8 = (
        serving.server_options(GPU[0], name, tmp_path, tmp_path)
        for name in (server, f"{server}-fp8")
    )
    at = fp8.index("--kv-cache-dtype")
    assert fp8[at + 1] == "fp8"
    assert fp8[:at] + fp8[at + 2 :] == plain


@pytest.mark.parametrize("plan", GPU + CPU, ids=lambda plan: plan.model)
@pytest.mark.parametrize("server", FOUR)
def test_vllm_takes_the_options(
    tmp_path: Path, folder_of: Callable[[str], Path], plan: Plan, server: str
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    folder = folder_of(plan.model)
    words = serving.server_options(plan, server, folder, tmp_path)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", str(folder), *words])
    config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    assert config.max_model_len <= config.hf_text_config.max_position_embeddings
    assert args.kv_cache_dtype == ("fp8" if server.endswith("fp8") else "auto")
    assert config.multimodal_config.get_limit_per_prompt("image") == 2


def test_plans_name_each_cell_once() -> None:
    for plans in (CPU, GPU, plans_for(cpu=True, quick=True), plans_for(cpu=False, quick=True)):
        names = [cell.name for _, cells in serving.visits(plans) for cell in cells]
        assert len(set(names)) == len(names) > 0
    (quick, cells), *others = serving.visits(plans_for(cpu=True, quick=True))
    assert len(others) == 3
    assert len(cells) == 2
    assert quick.chats is None


def test_drift_meets_all_alike() -> None:
    order = [(plan.model, cells[0].server) for plan, cells in serving.visits(TWO)]
    assert order == [("model", name) for name in FOUR] + [("other", name) for name in FOUR[::-1]]


# Cells, pieces and failures


class Fakes:
    """Instead of servers and loads: notes what is started and measured.

    Attributes:
        fail_at: name of the cell whose load fails.
        deadline: that the first cell crosses.
    """

    def __init__(self) -> None:
        self.started: list[str] = []
        self.measured: list[str] = []
        self.fail_at: str | None = None
        self.deadline: Deadline | None = None

    @contextmanager
    def start(self, plan: Plan, server: str, work: Path) -> Iterator[tuple[str, Path]]:
        self.started.append(f"{plan.model} {server}")
        yield "http://127.0.0.1:1", work

    def measure_cell(self, *arguments: Any) -> dict[str, float]:
        cell = arguments[-2]
        if cell.name == self.fail_at:
            raise LoadError("2 of 5 requests failed")
        self.measured.append(cell.name)
        if self.deadline is not None:
            self.deadline._end = 0.0  # long ago
        return {"requests_per_second": len(self.measured)}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()

    monkeypatch.setattr(serving, "Bench", lambda log: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(serving, "started", made.start)
    monkeypatch.setattr(serving, "measure_cell", made.measure_cell)
    return made


def results(folder: Path) -> Results:
    return Results(folder / "serving.json", {"plans": "these"}, cpu=True)


def run(folder: Path, seconds: float = 60, only: tuple[str, ...] = ()) -> list[str]:
    work = folder / "work"
    return serving.measure(TWO, results(folder), Deadline(seconds), work, only, SERVERS)


def test_a_run_measures_everything_once(fakes: Fakes, tmp_path: Path) -> None:
    assert run(tmp_path) == []
    assert fakes.started == ["model dense", "model sparsemm", "other sparsemm", "other dense"]
    assert sorted(results(tmp_path).cells) == sorted(fakes.measured)
    assert len(fakes.measured) == 2 * 3 + 2 * 2
    assert run(tmp_path) == []
    assert len(fakes.started) == 4, "nothing is left, nothing is started"


def test_a_piece_ends_after_the_cell_that_crosses_its_time(fakes: Fakes, tmp_path: Path) -> None:
    everything = run(tmp_path, seconds=0)
    assert len(everything) == 10
    assert fakes.started == [], "no time, nothing begun"
    fakes.deadline = Deadline(60)
    work = tmp_path / "work"
    left = serving.measure(TWO, results(tmp_path), fakes.deadline, work, servers=SERVERS)
    assert fakes.started == ["model dense"]
    assert [*fakes.measured, *left] == everything
    assert len(fakes.measured) == 1
    assert run(tmp_path) == []
    assert fakes.measured == everything, "the next piece does the rest"


def test_a_failed_load_loses_no_cell(fakes: Fakes, tmp_path: Path) -> None:
    fakes.fail_at = "model, shared, inf requests/s, dense"
    with pytest.raises(LoadError, match="2 of 5 requests failed"):
        run(tmp_path)
    assert len(results(tmp_path).cells) == 2
    fakes.fail_at = None
    assert run(tmp_path) == []
    assert len(fakes.measured) == len(set(fakes.measured)) == 10


def test_single_scenarios_can_be_asked_for(fakes: Fakes, tmp_path: Path) -> None:
    assert run(tmp_path, only=("chats",)) == []
    assert fakes.measured == ["other, chats, sparsemm", "other, chats, dense"]
    assert fakes.started == ["other sparsemm", "other dense"]


@pytest.mark.parametrize(("only", "status"), [("", 0), ("nothing", 2)])
def test_the_command(
    fakes: Fakes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: str,
    status: int,
) -> None:
    out = tmp_path / "serving.json"
    words = ["serving.py", "--quick", "--out", str(out), "--work", str(tmp_path), "--only", only]
    monkeypatch.setattr(sys, "argv", words)
    if status:
        with pytest.raises(SystemExit) as left:
            serving.main()
        assert left.value.code == status
        assert "known: chats, unique-" in capsys.readouterr().err
        return
    assert serving.main() == 0
    assert "8 cells" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--pieces-of", "0"])
    assert serving.main() == 0, "nothing is left"
    out.unlink()
    assert serving.main() == 3
    assert capsys.readouterr().out.count("left: ") == 8
    fakes.fail_at = fakes.measured[2]
    monkeypatch.setattr(sys, "argv", words)
    assert serving.main() == 1
    assert "2 of 5 requests failed" in capsys.readouterr().err


# What is told


def test_cells_stand_side_by_side() -> None:
    dense = {"requests": 5, "output_tokens_per_second": 20.0, "preemptions": 0, "commit": "abc"}
    cells = {
        "dense": dense,
        "dense-fp8": dense | {"output_tokens_per_second": 40.0, "preemptions": 1},
        "sparsemm": dense | {"output_tokens_per_second": 50.0, "preemptions": 2},
    }
    lines = beside("title", cells)
    assert lines[0] == "title"
    assert lines[1].split() == ["dense", "dense-fp8", "sparsemm", "/", "dense", "/", "dense-fp8"]
    assert lines[2].split()[-3:] == ["5", "5", "5"]
    assert lines[3].split()[-5:] == ["20", "40", "50", "2.50", "1.25"]
    assert lines[4].split()[-4:] == ["0", "1", "2", "2.00"], "nothing is a multiple of none"
    assert beside("title", {"dense": dense})[3].split()[-1] == "20"
    assert beside("title", {"sparsemm": dense})[1].split() == ["sparsemm"]
