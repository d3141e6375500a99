"""The one place that reads and writes environment variables."""

import ctypes
import os
import re
import sys
from pathlib import Path

SPARED = "HUMMING_DISABLE_PARALLEL_BUILD"  # vLLM imports humming: 14 s of CPU time a process
ANY_VLLM = "SPARSEMM_ANY_VLLM"
# What a launcher tells a rank: read by torch's env:// rendezvous, and by vLLM.
RANK_VARIABLE = re.compile(
    "((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    "|TORCHELASTIC_.*|VLLM_DP_.*)"
)
CPU_VARIABLES = {
    "SPARSEMM_CPU": "1",  # activates our CPU platform
    "TRITON_INTERPRET": "1",  # the V2 model runner's own kernels are Triton
    "CUDA_VISIBLE_DEVICES": "",
    SPARED: "1",  # nothing starts two Pythons that try to load CUDA code
}


def has_gpu() -> bool:
    """Whether NVIDIA's driver shows a GPU; loads neither torch nor a CUDA context."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0:
        return False
    found = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 and count.value > 0
    nvml.nvmlShutdown()
    return found


def use_cpu() -> None:
    """Let this process, and those it starts, serve SPARSEMM without a GPU.

    Raises:
        RuntimeError: if triton or vllm has been imported already: they read the environment then.
    """
    late = [name for name in ("triton", "vllm") if name in sys.modules]
    if late and not uses_cpu():
        raise RuntimeError(
            f"sparsemm_vllm.use_cpu() comes too late: {' and '.join(late)} has been imported; call "
            "it first"
        )
    os.environ.update(CPU_VARIABLES)


def uses_cpu() -> bool:
    """Whether `use_cpu` prepared this process, or one that started it."""
    needed = {name: value for name, value in CPU_VARIABLES.items() if name != SPARED}
    return needed.items() <= os.environ.items()


def quieten_vllm() -> None:
    """Let the vLLM of this process only warn, if nothing else was asked for; before it is imported.

    What draws a progress bar calls this.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def cache_folder() -> Path:
    """Where profiles that were made are kept: `$SPARSEMM_CACHE`, or the user's cache folder."""
    if folder := os.environ.get("SPARSEMM_CACHE"):
        return Path(folder).expanduser()
    import platformdirs  # most commands need no cache

    return Path(platformdirs.user_cache_dir("sparsemm"))


def metrics_folder() -> Path | None:
    """Where processes put their metrics together, if vLLM runs several API servers."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def uses_rust_front_end() -> bool:
    """Whether `vllm serve` leaves HTTP to vLLM's Rust program, in which nothing of ours runs."""
    return bool(int(os.environ.get("VLLM_USE_RUST_FRONTEND", "0")))


def quiet_environment(on_terminal: bool) -> dict[str, str]:
    """This environment, for a program whose output we pass on: its vLLM only warns.

    The program is no rank of what this process is a rank of: what torchrun and offline data
    parallelism tell a process is left out, or it would wait for the others.

    Args:
        on_terminal: whether it may draw as on a terminal, although it writes to a pipe.
    """
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING"} | {
        name: value for name, value in os.environ.items() if not RANK_VARIABLE.fullmatch(name)
    }
    return quiet | {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"} if on_terminal else quiet


def launched_on_one_node() -> bool:
    """Whether torchrun, or what is like it, says that it started all ranks on this node."""
    return os.environ.get("GROUP_WORLD_SIZE") == "1"  # its groups are nodes


def admits_any_vllm() -> bool:
    """Whether SPARSEMM should run on a vLLM of any version: only `sparsemm check --run` asks it."""
    return os.environ.get(ANY_VLLM) == "1"


def check_environment() -> dict[str, str]:
    """The environment of the engine that `sparsemm check --run` starts.

    Whatever version vLLM has, it loads SPARSEMM, in the process that asks it, and logs what it
    does. Nothing is fetched from a network.
    """
    environment = os.environ | {
        ANY_VLLM: "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the model is tiny: more threads would wait for each other
    }
    environment.pop("VLLM_PLUGINS", None)  # might leave SPARSEMM out
    return environment if has_gpu() else environment | CPU_VARIABLES
