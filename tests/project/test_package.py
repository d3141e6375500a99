"""The wheel: what it installs, and what it must not."""

import json
import subprocess
import sys
import venv

import pytest

from support.paths import ROOT

LOOK = """
import importlib.util, json
from importlib.metadata import distribution, entry_points, files
from importlib import resources
installed = [str(f) for f in files('sparsemm-vllm')]
package = resources.files('sparsemm_vllm')
print(json.dumps({
    'top': sorted({f.split('/')[0] for f in installed if not f.startswith('..')}),
    'foreign': importlib.util.find_spec('triton_kernels') is not None,
    'kernels': importlib.util.find_spec('sparsemm_vllm.triton_kernels.reference') is not None,
    'profiles': [p.name for p in resources.files('sparsemm_vllm.head_profiles').iterdir()],
    'page': (package / 'engine/frontend/page.html').is_file(),
    'contracts': [p.name for p in (package / 'engine/vllm_api/contracts').iterdir()],
    'reader': [p.name for p in (package / 'reader').iterdir()],
    'plugins': sorted((p.group, p.name) for g in ('vllm.endpoint_plugins', 'vllm.general_plugins',
                                                          'vllm.platform_plugins')
                      for p in entry_points(group=g)),
    'commands': [p.name for p in entry_points(group='console_scripts') if 'sparsemm' in p.value],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """A wheel built from the tracked files, installed alone into a clean environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "clean")
    python = folder / "clean" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    done = subprocess.run(
        [str(python), "-c", LOOK], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_only_our_name_at_the_top_level(installed: dict[str, list[str]]) -> None:
    names = [name for name in installed["top"] if not name.endswith(".dist-info")]
    assert names == ["sparsemm_vllm"]
    assert not installed["foreign"], "triton_kernels is the name of another project"
    assert installed["kernels"]


def test_data_is_installed(installed: dict[str, list[str]]) -> None:
    assert "sparsemm-reader.json" in installed["profiles"]
    assert "model.safetensors" in installed["reader"]
    assert installed["page"]
    assert {"vllm-0.32.json", "vllm-0.33.json"} <= set(installed["contracts"])


def test_plugins_and_command(installed: dict[str, list[str]]) -> None:
    assert installed["plugins"] == [
        ["vllm.endpoint_plugins", "sparsemm_page"],
        ["vllm.general_plugins", "sparsemm"],
        ["vllm.platform_plugins", "sparsemm"],
    ]
    assert installed["commands"] == ["sparsemm"]
