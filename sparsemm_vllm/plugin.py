"""vLLM's entry points. Loaded in every process of every vLLM, so they do next to nothing.

What `SPARSEMM` needs inside vLLM (`patches.py`) is installed where it is asked for: by
`EngineArgs.create_engine_config` in the process that builds the configuration, and in spawned ones
by unpickling that configuration.
"""

import functools
import json
import logging
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsemm_vllm.environment import uses_cpu

NAME = "SPARSEMM"
CUDA_BACKEND = "sparsemm_vllm.cuda_backend.SparseMMBackend"
CPU_BACKEND = "sparsemm_vllm.cpu_backend.SparseMMBackend"

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
    return "sparsemm_vllm.cpu_platform.SparseMMCpuPlatform"


def register() -> None:
    """Make `SPARSEMM` an attention backend that can be asked for. Idempotent.

    Does nothing but warn in a vLLM that is not supported, which must work without SPARSEMM.
    """
    from sparsemm_vllm.patches import version_problem

    if problem := version_problem():
        if _named_on_the_command_line():
            raise SystemExit(f"SPARSEMM: {problem}")
        logging.getLogger("vllm").warning("SPARSEMM is not available: %s", problem)
        return

    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.device_type and _named_on_the_command_line():
        raise SystemExit(NO_GPU)
    if NAME in AttentionBackendEnum.__members__:
        return
    register_backend(NAME, CUDA_BACKEND if current_platform.is_cuda() else CPU_BACKEND)
    _pickle_by_name(AttentionBackendEnum)

    from vllm.engine.arg_utils import EngineArgs

    EngineArgs.create_engine_config = _install_if_asked(EngineArgs.create_engine_config)


def _named_on_the_command_line() -> bool:
    return named_in(sys.argv[1:])


def named_in(arguments: list[str]) -> bool:
    """Whether a command line of vLLM's asks for the backend, or its configuration file does.

    A model or a path whose name is like ours does not. What is missed, such as a shortened option,
    gets an error of vLLM's own later.

    Args:
        arguments: words after the program's name.
    """
    words = [*arguments, *_words_of_config_file(arguments)]
    return any(_names_us(word, following) for word, following in pairwise([*words, ""]))


def _names_us(word: str, following: str) -> bool:
    """Whether a word, with the next one as its value if it has none, is an option that names us."""
    option, has_value, value = word.partition("=")
    name, *keys = option.split(".")
    name = name.replace("_", "-")
    value = value if has_value else following
    if name == "--attention-backend":
        return value.upper() == NAME
    if name not in ("--attention-config", "-ac"):
        return False
    try:
        asked = json.loads(value)
    except ValueError:  # a word
        asked = value
    for key in reversed(keys):
        asked = {key: asked}
    backends = asked if isinstance(asked, dict) else {}
    per_kind = backends.get("backend_per_kind")
    named = [backends.get("backend"), *(per_kind.values() if isinstance(per_kind, dict) else ())]
    return any(str(backend).upper() == NAME for backend in named)


def _words_of_config_file(arguments: list[str]) -> list[str]:
    """The options of the file behind `--config`, if it is one that vLLM would read."""
    import yaml

    if "--config" not in arguments[:-1]:
        return []
    file = Path(arguments[arguments.index("--config") + 1])
    if file.suffix not in (".yaml", ".yml"):
        return []
    try:
        options = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):  # vLLM says what is wrong with it
        return []
    words = []
    for key, value in options.items() if isinstance(options, dict) else ():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value, default=str)]
    return words


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
    _install()
    return AttentionBackendEnum[NAME]


def _install() -> None:
    from sparsemm_vllm import patches

    patches.install()


def _install_if_asked(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _asks_for_us(self):
            if isinstance(self.additional_config, dict) and "sparsemm" in self.additional_config:
                logging.getLogger("vllm").warning(NOT_ASKED_FOR)
            return create(self, *args, **kwargs)
        from vllm.platforms import current_platform

        if not current_platform.device_type:
            raise RuntimeError(NO_GPU)
        _install()
        from sparsemm_vllm.support import prepare_config

        vllm_config = create(self, *args, **kwargs)
        prepare_config(vllm_config, self)
        return vllm_config

    return create_engine_config


def _asks_for_us(engine_args: Any) -> bool:
    asked = [engine_args.attention_backend, engine_args.attention_config.backend]
    asked += (engine_args.attention_config.backend_per_kind or {}).values()
    return any(str(getattr(backend, "name", backend)).upper() == NAME for backend in asked)
