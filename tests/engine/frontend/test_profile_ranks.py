"""One profile for all processes that want one, ranks of an external launcher among them."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsemm_vllm import environment
from sparsemm_vllm.budget.profile import HeadProfile, ProfileError
from sparsemm_vllm.commands.server import free_port
from sparsemm_vllm.engine.frontend import auto_profile, profile_cache
from support.profiler_program import Program, build, engine_args, no_space
from support.tiny import make_llava


def test_several_processes_make_one(llava: Path, program: Program, made: HeadProfile) -> None:
    program.write(seconds=1)
    args = engine_args(llava, made.model_dump(mode="json"))
    config = args.create_engine_config()
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def start() -> None:
        found = auto_profile.find_profile(config, args)
        results.put(found is not None and found.scores == made.scores)

    started = [fork.Process(target=start) for _ in range(4)]
    for process in started:
        process.start()
    assert [results.get(timeout=60) for _ in started] == [True] * 4
    for process in started:
        process.join()
    assert len(program.runs) == 1


EXTERNAL_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}


def told_by_launcher(rank: int) -> dict[str, str]:
    """What torchrun, and vLLM's offline data parallelism, put into a rank's environment."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": "2", "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank), "VLLM_DP_SIZE": "2",
        "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": "1",
    }  # fmt: skip


def test_ranks_make_one_and_say_for_whom_they_wait(
    llava: Path, program: Program, made: HeadProfile, said: list[str], monkeypatch: Any
) -> None:
    """The program is none of them: it would wait for the other, which waits for it."""
    program.write(wait_for="seen")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM sets it, and leaves it so
    for module in (auto_profile, profile_cache):
        monkeypatch.setattr(module, "SAY_EVERY", 0.5)
    args = engine_args(llava, made.model_dump(mode="json"), **EXTERNAL_RANKS)
    config = args.create_engine_config()
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def start(rank: int) -> None:
        os.environ.update(told_by_launcher(rank))
        found = auto_profile.find_profile(config, args)
        results.put((os.getpid(), found is not None and found.scores == made.scores, said))

    def see(text: str, *values: Any) -> None:
        said.append(text % values)
        if sum("waiting for process" in line for line in said) == 2:
            (program.path.parent / "seen").touch()

    monkeypatch.setattr(profile_cache.logger, "warning", see)
    ranks = [fork.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    found.sort(key=lambda result: any("One is made now" in line for line in result[2]))
    (_, waited_ok, waited), (maker, made_ok, making) = found
    assert waited_ok
    assert made_ok
    assert any("is being made by process" in line for line in making)
    assert any(f"waiting for process {maker} on " in line for line in waited)
    (arguments,) = program.runs
    assert "--tensor-parallel-size 2" in arguments
    assert "external_launcher" not in arguments
    assert not told_by_launcher(0).keys() & program.environment.keys()
    assert not list(environment.cache_folder().glob("*.holder"))


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of torchrun's."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM sets it, and leaves it so
    for name, value in told_by_launcher(0).items():
        if not name.startswith("VLLM_DP"):
            monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("nodes", ["2", None])
def test_ranks_on_other_nodes_cannot_share_a_file(
    llava: Path, program: Program, said: list[str], nodes: str | None, monkeypatch: Any
) -> None:
    if nodes:
        monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    else:
        monkeypatch.delenv("GROUP_WORLD_SIZE")
    assert build(llava, **EXTERNAL_RANKS) == "none"
    (line,) = said
    assert "does not say that all ranks are on one node" in line
    assert '"none"' in line
    assert not program.runs


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("folder", ["cannot be written", "is full"])
def test_ranks_without_a_file_to_share_are_refused(
    llava: Path, program: Program, tmp_path: Path, folder: str, monkeypatch: Any
) -> None:
    """Each would have budgets of its own, and read blocks that the others do not mean."""
    if folder == "is full":
        monkeypatch.setattr(profile_cache, "save_profile", no_space)
    else:
        for name in ("cache", f"tmp/sparsemm-{os.getuid()}"):
            (tmp_path / name).write_text("a file where the folder should be")
    with pytest.raises(ProfileError, match="all ranks of an external launcher need the same"):
        build(llava, **EXTERNAL_RANKS)
    assert len(program.runs) == (folder == "is full")


# A rank: it builds its configuration, as each process of an external launcher does.
RANK = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
if __name__ == "__main__":
    arguments = EngineArgs(model=sys.argv[1], attention_backend="SPARSEMM", dtype="float32",
                           max_model_len=512, max_num_seqs=8, **json.loads(sys.argv[2]))
    settings = arguments.create_engine_config().additional_config["sparsemm"]
    print("profile", json.dumps(settings["profile"]["scores"]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.engine
def test_torchrun_with_the_real_profiler(tmp_path: Path, monkeypatch: Any) -> None:
    """Two ranks of one model, which would hold half of its heads each."""
    monkeypatch.setenv("SPARSEMM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rank.py").write_text(RANK)
    model = make_llava(tmp_path / "model")
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2"]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    arguments = [tmp_path / "rank.py", model, json.dumps(EXTERNAL_RANKS)]
    done = subprocess.run(
        [str(word) for word in [*launcher, *address, *arguments]],
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    profiles = [line for line in done.stdout.splitlines() if line.startswith("profile ")]
    assert len(profiles) == 2
    assert len(set(profiles)) == 1
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    assert "waiting for process" in done.stdout
