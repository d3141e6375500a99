"""What happens in processes of their own: without SPARSEMM, without a GPU, spawned, forked."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from sparsemm_vllm.environment import CPU_VARIABLES, SPARED
from support.tiny import make_llama

PLAIN = {k: v for k, v in os.environ.items() if k not in CPU_VARIABLES}
PLAIN |= {"CUDA_VISIBLE_DEVICES": "", SPARED: "1"}
PREPARED = PLAIN | CPU_VARIABLES


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180
    )


IMPORT = """
import vllm, sys
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.core.kv_cache_manager import KVCacheManager
print(type(current_platform).__name__, hasattr(KVCacheManager.get_computed_blocks, '__sparsemm__'),
      'sparsemm_vllm.engine.scheduler.manager' in sys.modules)
"""
ASK = "vllm.LLM(model='.', attention_backend='SPARSEMM')"


@pytest.fixture(scope="module")
def asked_late() -> subprocess.CompletedProcess[str]:
    """A process without a GPU that imports vLLM, and asks for SPARSEMM after that."""
    return python(IMPORT + ASK, PLAIN)


def test_import_vllm_behaves_as_if_the_plugin_were_absent(
    asked_late: subprocess.CompletedProcess[str],
) -> None:
    without = python(IMPORT, PLAIN | {"VLLM_PLUGINS": ""})
    assert without.returncode == 0, without.stderr
    assert without.stdout.endswith("False False\n")
    assert asked_late.stdout.startswith(without.stdout)


@pytest.mark.engine
def test_text_model_without_sparsemm(tmp_path: Path) -> None:
    """A model served with another backend has vLLM's own spec, manager and model state."""
    model = make_llama(tmp_path)
    code = (
        "import os; os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0'\n"
        "from vllm import LLM, SamplingParams\n"
        f"llm = LLM(model={str(model)!r}, enforce_eager=True, dtype='float32', max_model_len=256,"
        " kv_cache_memory_bytes=16 << 20)\n"
        "out = llm.generate('some text', SamplingParams(max_tokens=4, temperature=0))\n"
        "core = llm.llm_engine.engine_core.engine_core\n"
        "(manager,) = core.scheduler.kv_cache_manager.coordinator.single_type_managers\n"
        "runner = core.model_executor.driver_worker.worker.model_runner\n"
        "print(len(out[0].outputs[0].token_ids), type(manager).__name__,"
        " type(manager.kv_cache_spec).__name__, type(runner.model_state).__name__)"
    )
    done = python(code, PREPARED)
    expected = "4 FullAttentionManager FullAttentionSpec DefaultModelState"
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr[-2000:]


def test_vllm_serve_without_a_gpu_names_the_command() -> None:
    vllm = Path(sys.executable).parent / "vllm"
    command = [str(vllm), "serve", "some-model", "--attention-backend", "SPARSEMM"]
    done = subprocess.run(command, env=PLAIN, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert "sparsemm serve MODEL --attention-backend SPARSEMM" in done.stderr
    assert "Traceback" not in done.stderr


def test_llm_without_a_gpu_names_the_call(asked_late: subprocess.CompletedProcess[str]) -> None:
    assert asked_late.returncode != 0
    assert "sparsemm_vllm.use_cpu()" in asked_late.stderr


@pytest.mark.parametrize(
    "installed",
    ["0.31.2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("0.34.0", "0.32.0+cpu"))],
)
def test_unsupported_vllm_works_without_sparsemm(installed: str) -> None:
    code = (
        "import sys\n"
        "from sparsemm_vllm import plugin\n"
        "from sparsemm_vllm.engine.vllm_api import compatibility\n"
        f"compatibility.version = lambda name: {installed!r}\n"
        "sys.argv = ['vllm', 'serve', '/models/SPARSEMM']\n"
        "plugin.register()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "assert 'SPARSEMM' not in AttentionBackendEnum.__members__\n"
        "sys.argv += ['--attention-backend', 'SPARSEMM']\n"
        "plugin.register()\n"
    )
    done = python(code, PLAIN)
    assert done.returncode != 0
    warning, refusal = done.stderr.splitlines()
    assert warning.startswith(f"SPARSEMM is not available: vLLM {installed} is ")
    assert refusal.startswith(f"SPARSEMM: vLLM {installed} is ")


def test_use_cpu_too_late() -> None:
    done = python("import triton, sparsemm_vllm; sparsemm_vllm.use_cpu()", PLAIN)
    assert done.returncode != 0
    assert "comes too late: triton has been imported" in done.stderr


def _what_arrives(pickled: bytes, queue: "multiprocessing.Queue[tuple[str, str, bool]]") -> None:
    from sparsemm_vllm.engine.vllm_api.compatibility import require_installed

    backend = pickle.loads(pickled)
    require_installed()
    queue.put((backend.name, backend.get_class().get_name(), hasattr(backend, "value")))


# An engine that was spawned serves in test_serve.py.
@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_configuration_reaches_other_processes(method: str) -> None:
    """A spawned engine unpickles its configuration before it has loaded a plugin."""
    from sparsemm_vllm.plugin import backend_member

    pickled = pickle.dumps(backend_member())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_what_arrives, args=(pickled, queue))
    process.start()
    assert queue.get(timeout=120) == ("SPARSEMM", "SPARSEMM", True)
    process.join()
    assert process.exitcode == 0


def test_other_backends_pickle_as_before() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sparsemm_vllm.plugin import backend_member

    backend_member()
    flash = AttentionBackendEnum.FLASH_ATTN
    assert pickle.loads(pickle.dumps(flash)) is flash
