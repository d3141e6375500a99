"""Whether SPARSEMM is asked for: on a command line, in a file, or in an engine's arguments.

Loaded in every process of every vLLM: yaml is imported when there is a file to read.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsemm_vllm.names import NAME


def named_on_the_command_line() -> bool:
    """Whether this process was started by a command that asks for the backend."""
    return named_in(sys.argv[1:])


def named_in(arguments: list[str]) -> bool:
    """Whether a command line of vLLM's asks for the backend, or its configuration file does.

    A model or a path whose name is like ours does not. What is missed, such as a shortened option,
    gets an error from vLLM later.

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


def asks_for_us(engine_args: Any) -> bool:
    """Whether an engine with these arguments, vLLM's `EngineArgs`, would use the backend."""
    asked = [engine_args.attention_backend, engine_args.attention_config.backend]
    asked += (engine_args.attention_config.backend_per_kind or {}).values()
    return any(str(getattr(backend, "name", backend)).upper() == NAME for backend in asked)
