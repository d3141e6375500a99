"""vLLM's entry points. Loaded in every process of every vLLM, so they do next to nothing.

What `SPARSEMM` needs inside vLLM (`engine/patches.py`) is installed where it is asked for: by
`EngineArgs.create_engine_config` in the process that builds the configuration, and in spawned ones
by unpickling that configuration. Imports inside functions are for start-up time: every `vllm`
command pays for what this module imports.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from sparsemm_vllm.engine.frontend.asked import asks_for_us, named_on_the_command_line
from sparsemm_vllm.environment import uses_cpu
from sparsemm_vllm.names import CPU_BACKEND, CPU_PLATFORM, CUDA_BACKEND, KEY, NAME

NO_GPU = (
    "SPARSEMM: no GPU was found. On the CPU, start the server with\n\n"
    "    sparsemm serve MODEL --attention-backend SPARSEMM ...\n\n"
    "which sets the environment it needs and runs `vllm serve`; in Python, call "
    "sparsemm_vllm.use_cpu() before importing vllm."
)

NOT_ASKED_FOR = (
    "SPARSEMM: there are settings for it, but it was not asked for, and nothing will be pruned; "
    "add --attention-backend SPARSEMM"
)


def platform() -> str | None:
    """The CPU platform, in processes that `sparsemm serve` or `use_cpu` prepared."""
    if not uses_cpu():
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is not None:  # a CPU build of vLLM: refused when SPARSEMM is asked for
        return None
    return CPU_PLATFORM


def register() -> None:
    """Make `SPARSEMM` an attention backend that can be asked for. Idempotent.

    Does nothing but warn in a vLLM that is not supported, which must work without SPARSEMM.
    """
    from sparsemm_vllm.engine.vllm_api.compatibility import version_problem

    if problem := version_problem():
        if named_on_the_command_line():
            raise SystemExit(f"SPARSEMM: {problem}")
        logging.getLogger("vllm").warning("SPARSEMM is not available: %s", problem)
        return

    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.device_type and named_on_the_command_line():
        raise SystemExit(NO_GPU)
    if NAME in AttentionBackendEnum.__members__:
        return
    register_backend(NAME, CUDA_BACKEND if current_platform.is_cuda() else CPU_BACKEND)
    _pickle_by_name(AttentionBackendEnum)

    from vllm.engine.arg_utils import EngineArgs

    EngineArgs.create_engine_config = _prepare_if_asked(EngineArgs.create_engine_config)


def _pickle_by_name(enum: Any) -> None:
    """A spawned process has not loaded plugins when it unpickles the configuration."""
    by_value = enum.__reduce_ex__

    def reduce(self: Any, protocol: int) -> Any:
        return (backend_member, ()) if self._name_ == NAME else by_value(self, protocol)

    enum.__reduce_ex__ = reduce


def backend_member() -> Any:
    """The enum member, in a process that received it in a configuration."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    install()
    return AttentionBackendEnum[NAME]


def install() -> None:
    """Install in vLLM what SPARSEMM needs there, in this process. Idempotent.

    Raises:
        IncompatibleError: listing everything that SPARSEMM would fail with in this vLLM.
    """
    from sparsemm_vllm.engine.vllm_api.compatibility import require_compatible

    require_compatible()  # before the import, which may fail in any way
    from sparsemm_vllm.engine import patches

    patches.install()


def _prepare_if_asked(create: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineArgs.create_engine_config`: what asks for us is checked, completed and installed."""

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not asks_for_us(self):
            if isinstance(self.additional_config, dict) and KEY in self.additional_config:
                logging.getLogger("vllm").warning(NOT_ASKED_FOR)
            return create(self, *args, **kwargs)
        from vllm.platforms import current_platform

        if not current_platform.device_type:
            raise RuntimeError(NO_GPU)
        install()
        from sparsemm_vllm.engine.frontend.startup import prepare_config

        vllm_config = create(self, *args, **kwargs)
        prepare_config(vllm_config, self)
        return vllm_config

    return create_engine_config
