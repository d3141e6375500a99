"""Whether the installed vLLM is one that SPARSEMM can run on, and whether it is installed in it.

Before any function of vLLM's is wrapped, what SPARSEMM needs of it is compared with what was
recorded of that release (`contract.py`): if anything moved that SPARSEMM would fail with, it does
not start, and lists all of it.
"""

import logging
from importlib.metadata import version

from packaging.version import Version

from sparsemm_vllm.engine.vllm_api import contract
from sparsemm_vllm.engine.vllm_api.hooks import HOOKS, IN_EVERY_PROCESS, IN_WORKERS
from sparsemm_vllm.environment import admits_any_vllm

SUPPORTED = ("0.32", "0.34")


def installed_version() -> str:
    """The version of vLLM that is installed. Imports nothing."""
    return version("vllm")


class IncompatibleError(RuntimeError):
    """This vLLM is not one that SPARSEMM was written for."""


def version_problem() -> str | None:
    """Why the installed vLLM is not one of the supported ones, if it is not. Imports nothing."""
    lowest, above = map(Version, SUPPORTED)
    installed = Version(installed_version())
    if admits_any_vllm():
        return None
    if not lowest <= Version(installed.base_version) < above:
        return (
            f"vLLM {installed} is installed; SPARSEMM supports >={lowest},<{above} "
            "(`sparsemm check --run` says what differs, and whether it would serve)"
        )
    if installed.local is not None and "cpu" in installed.local:
        return (
            f"vLLM {installed} is a build for the CPU, whose kernels SPARSEMM does not know; "
            "install the ordinary wheel (pip install vllm): with it `sparsemm serve` works "
            "without a GPU"
        )
    return None


def differences() -> list[contract.Difference]:
    """What in the modules of vLLM that this process has loaded is not as it was recorded."""
    return contract.compare(contract.nearest(installed_version()), HOOKS, loaded_only=True)


def require_compatible() -> None:
    """Refuse a vLLM that SPARSEMM would fail in. Imports what is to be wrapped.

    Raises:
        IncompatibleError: listing everything that SPARSEMM would fail with.
    """
    if found := problems():
        raise IncompatibleError("SPARSEMM cannot run on this vLLM: " + "; ".join(found))


def problems() -> list[str]:
    """What keeps SPARSEMM from working in the installed vLLM; empty if nothing does.

    What differs and does not break it is a warning in vLLM's log.
    """
    if found := version_problem():
        return [found]
    gone = []
    for hook in IN_EVERY_PROCESS:
        try:
            contract.resolve(hook.symbol)
        except (ImportError, AttributeError) as error:
            gone.append(f"{hook.symbol}: {error}")
    return gone or _breaking(differences())


def require_compatible_worker() -> None:
    """The same of what only workers import.

    Raises:
        IncompatibleError: listing everything that SPARSEMM would fail with.
    """
    for hook in IN_WORKERS:
        contract.resolve(hook.symbol)
    if found := _breaking(differences()):
        raise IncompatibleError("SPARSEMM cannot run on this vLLM: " + "; ".join(found))


def _breaking(found: list[contract.Difference]) -> list[str]:
    """Those that break SPARSEMM; the others are logged, and all where any vLLM is to be tried."""
    breaking = [] if admits_any_vllm() else [d for d in found if d.breaks]
    if harmless := [str(difference) for difference in found if difference not in breaking]:
        logging.getLogger("vllm.sparsemm").warning(
            "SPARSEMM: vLLM %s is not in all as the %s that SPARSEMM was tested with; run "
            "`sparsemm check --run` before you rely on it: %s",
            installed_version(),
            contract.nearest(installed_version()).vllm,
            "; ".join(harmless),
        )
    return [str(difference) for difference in breaking]


def require_installed() -> None:
    """Refuse to run half installed: without its hooks SPARSEMM would read freed blocks.

    Raises:
        IncompatibleError: if `plugin.install` did not run in this process.
    """
    missing = [hook.symbol for hook in IN_EVERY_PROCESS if not hook.is_installed()]
    if missing:
        raise IncompatibleError(
            "SPARSEMM is not installed in this process; build the engine from EngineArgs, or call "
            f"sparsemm_vllm.plugin.install() first (missing: {', '.join(missing)})"
        )
