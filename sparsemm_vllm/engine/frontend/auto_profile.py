"""`"profile": "auto"`: a model's head profile is found, or made before the engine is built.

The cache layout needs the budgets, so a profile cannot be made by the engine that will use it: a
program of its own makes it, `sparsemm profile`, with the same model options, and ends before this
process starts its engine.
"""

import codecs
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import (
    HeadProfile,
    ProfileError,
    bundled_profiles,
    load_bundled_profile,
    load_profile,
)
from sparsemm_vllm.engine.frontend.profile_cache import SAY_EVERY, ProfileCache
from sparsemm_vllm.environment import launched_on_one_node, quiet_environment
from sparsemm_vllm.geometry import FAMILIES
from sparsemm_vllm.processes import end_group, program

logger = init_logger("vllm.sparsemm.profile")

AVOID = (
    '--additional-config \'{"sparsemm": {"profile": ...}}\' names a profile made elsewhere, or, '
    'with "none", gives all heads the same budget'
)
# What tells vLLM which model to load, how and where; the rest is of serving. A token goes another
# way: `token_variables`. `quantization_config` goes none: vLLM has put objects in place of names.
MODEL_OPTIONS = (
    "allow_deprecated_quantization",
    "code_revision",
    "config_format",
    "cpu_distributed_timeout_seconds",
    "cpu_offload_gb",
    "cpu_offload_params",
    "device_ids",
    "disable_custom_all_reduce",
    "disable_sliding_window",
    "distributed_executor_backend",
    "distributed_timeout_seconds",
    "download_dir",
    "dtype",
    "enable_expert_parallel",
    "gpu_memory_utilization",
    "hf_config_path",
    "hf_overrides",
    "ignore_patterns",
    "kv_cache_memory_bytes",
    "linear_backend",
    "load_format",
    "max_model_len",
    "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "mm_encoder_tp_mode",
    "mm_processor_kwargs",
    "model_class_overrides",
    "model_impl",
    "model_loader_extra_config",
    "moe_backend",
    "offload_backend",
    "offload_group_size",
    "offload_num_in_group",
    "offload_params",
    "offload_prefetch_step",
    "pipeline_parallel_size",
    "pt_load_map_location",
    "quantization",
    "revision",
    "safetensors_load_strategy",
    "safetensors_prefetch_block_size",
    "safetensors_prefetch_num_threads",
    "skip_mm_profiling",
    "tensor_parallel_size",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "trust_remote_code",
)
EXTERNAL = "external_launcher"  # every rank is a process of the user's; the profiler has its own
NOT_KEPT = "all ranks of an external launcher need the same head profile, from a file"
SMALL_PICTURES, PAGES = "ocr", "ocr-448"  # `sparsemm_vllm.data`
MIN_PAGE_INPUT = 336  # pixels a side, of the vision tower
SAMPLES = 100
LAST_LINES = 20


def find_profile(vllm_config: VllmConfig, engine_args: Any) -> HeadProfile | None:
    """The profile of the model that is about to be served; none if there can be none.

    Bundled ones come first, then those in the cache; then one is made, in a minute or so.

    Args:
        vllm_config: configuration of the engine that will be built.
        engine_args: arguments that the configuration was made from.

    Raises:
        ProfileError: if one had to be made and could not.
    """
    model = vllm_config.model_config
    known_as, digest = model_id(model.model), config_hash(model.hf_config)
    if name := bundled_profile(known_as, digest):
        logger.info("SPARSEMM: head profile %r, which comes with sparsemm-vllm", name)
        return load_bundled_profile(name)
    if reason := why_no_profile(vllm_config, engine_args):
        logger.warning(
            "SPARSEMM: no head profile for %s: every head gets the same budget, because %s. %s",
            known_as, reason, AVOID,
        )  # fmt: skip
        return None
    cache = ProfileCache(known_as, digest)
    if found := _cached(cache):
        return found
    with cache.lock() as is_locked:
        return _cached(cache) or _make(vllm_config, engine_args, cache, is_locked)


def model_id(model: str) -> str:
    """The Hub's name of a model that is given as a folder of the Hub's cache; others as they are.

    vLLM puts the folder in place of the name where the Hub is offline.
    """
    folders = [part for part in Path(model).parts if part.startswith("models--")]
    return folders[-1].removeprefix("models--").replace("--", "/") if folders else model


def bundled_profile(model: str, digest: str) -> str | None:
    """Name of the bundled profile that was made for a model."""
    for name in bundled_profiles():
        profile = load_bundled_profile(name)
        if profile.config_hash == digest:
            return name
        if profile.config_hash is None and profile.model_id == model:
            return name
    return None


def why_no_profile(vllm_config: VllmConfig, engine_args: Any) -> str | None:
    """Why no profile can be made of a model, if so."""
    model = vllm_config.model_config
    pictures = model.multimodal_config
    family = model.hf_config.model_type
    checks = [
        (pictures is None, "it takes no pictures"),
        (
            pictures is not None and pictures.get_limit_per_prompt("image") == 0,
            "pictures are switched off",
        ),
        (
            family not in FAMILIES,
            f"it is not known which tokens of the family {family!r} show which part of a picture "
            f"(known: {', '.join(FAMILIES)})",
        ),
        (engine_args.load_format == "dummy", "its weights are random (--load-format dummy)"),
        (model.skip_tokenizer_init, "it has no tokenizer (--skip-tokenizer-init)"),
        (callable(engine_args.hf_overrides), "hf_overrides is a function of this program"),
        (
            vllm_config.parallel_config.nnodes > 1,
            "each node would make its own; all nodes need the same file",
        ),
        (
            _has_external_ranks(vllm_config) and not launched_on_one_node(),
            "the external launcher does not say that all ranks are on one node (torchrun sets "
            "GROUP_WORLD_SIZE=1): each node would make its own, and all need the same file",
        ),
    ]
    return next((reason for applies, reason in checks if applies), None)


def _cached(cache: ProfileCache) -> HeadProfile | None:
    if found := cache.load():
        profile, file = found
        logger.info("SPARSEMM: head profile %s, made on %s", file, profile.created)
        return profile
    return None


def _has_external_ranks(vllm_config: VllmConfig) -> bool:
    """Whether several processes, each of which comes here, will be ranks of one model."""
    parallel = vllm_config.parallel_config
    return parallel.distributed_executor_backend == EXTERNAL and parallel.world_size > 1


def _make(
    vllm_config: VllmConfig, engine_args: Any, cache: ProfileCache, is_locked: bool
) -> HeadProfile:
    """Make a profile, while no other process does, and keep it.

    Raises:
        ProfileError: if it could not be made, or not be kept where ranks need the same one.
    """
    model = vllm_config.model_config
    if not is_locked and _has_external_ranks(vllm_config):
        raise ProfileError(f"{NOT_KEPT}: {cache.file.parent} cannot be written; {AVOID}")
    logger.warning(
        "SPARSEMM: there is no head profile for %s yet. One is made now, which takes a minute or "
        "two beside loading the model, and is kept in %s. To avoid this: %s",
        model_id(model.model), cache.file, AVOID,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sparsemm-") as folder:
        made = Path(folder) / "profile.json"
        pictures = pictures_for(model.hf_config.vision_config)
        run_profiler(
            profile_command(engine_args, made, pictures), token_variables(engine_args.hf_token)
        )
        profile = load_profile(str(made))
    if file := cache.save(profile):
        logger.info("SPARSEMM: head profile kept: %s", file)
    elif _has_external_ranks(vllm_config):
        raise ProfileError(f"{NOT_KEPT}: no folder takes it; {AVOID}")
    return profile


def pictures_for(vision_config: Any) -> str:
    """Which drawn pictures suit a model: what it sees of larger ones must still be readable."""
    size = getattr(vision_config, "image_size", None)
    return SMALL_PICTURES if isinstance(size, int) and size < MIN_PAGE_INPUT else PAGES


def profile_command(engine_args: Any, out: Path, pictures: str) -> list[str]:
    """`sparsemm profile` for the model that an engine will serve."""
    command = [program("sparsemm", "sparsemm-vllm"), "profile", engine_args.model]
    command += ["--out", str(out), "--data", pictures, "--mode", "forced"]
    command += ["--samples", str(SAMPLES)]
    for field in fields(engine_args):
        value = getattr(engine_args, field.name)
        external = field.name == "distributed_executor_backend" and value == EXTERNAL
        if field.name in MODEL_OPTIONS and not isinstance(value, type) and not external:
            command += _option(field, value)
    return [*command, "--hf-token"] if engine_args.hf_token else command


def token_variables(hf_token: bool | str | None) -> dict[str, str]:
    """Variables that let a program use a token; its command line is no secret.

    Args:
        hf_token: token of the Hub, or whether to use the one that is stored. With `--hf-token` a
            program uses the one of its environment, and for want of it the stored one.
    """
    if isinstance(hf_token, str):
        return {"HF_TOKEN": hf_token}
    return {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"} if hf_token is False else {}


def _option(field: "Field[Any]", value: Any) -> list[str]:
    """An engine option as vLLM's command line spells it; nothing for a default."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or value == default:
        return []
    name = field.name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if field.name == "device_ids":
        return [f"--{name}", ",".join(map(str, value))]
    if isinstance(value, list | set):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", value.name if isinstance(value, Enum) else str(value)]


def show_text(text: str) -> None:
    """Pass on what the profiler writes, at once, so that its progress bar moves."""
    sys.stderr.write(text)
    sys.stderr.flush()


def run_profiler(
    command: list[str],
    variables: dict[str, str] | None = None,
    show: Callable[[str], None] = show_text,
) -> None:
    """Run a program and show what it writes as it comes; say so if it writes nothing for long.

    Args:
        command: program and its arguments.
        variables: variables of its environment beside those of this process.
        show: function that is called with each piece of its output.

    Raises:
        ProfileError: if it fails, with its last lines.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its engine can be ended with it
        env=quiet_environment(on_terminal=sys.stderr.isatty()) | (variables or {}),
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    with _exit_on_sigterm(), process:
        try:
            for chunk in _output(process):
                piece = decoder.decode(chunk)
                show(piece)
                text = (text + piece)[-20_000:]
        except BaseException:  # Ctrl-C too: it must not go on without us
            end_group(process)
            raise
    if process.returncode:
        raise ProfileError(
            f"the head profile could not be made: sparsemm profile ended with code "
            f"{process.returncode}:\n{last_lines(text)}\n{AVOID}"
        )


def _output(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What a program writes, until it and all that it started have ended."""
    assert process.stdout is not None
    since = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(SAY_EVERY):
                if not (chunk := os.read(process.stdout.fileno(), 1 << 16)):
                    return
                yield chunk
            elif process.poll() is None:
                logger.info(
                    "SPARSEMM: the head profile is being made by process %d (%.0f s so far)",
                    process.pid, time.monotonic() - since,
                )  # fmt: skip
            else:  # something that it started lives on and holds the pipe
                end_group(process)
                return


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise, which by default would leave the program behind."""
    if threading.current_thread() is not threading.main_thread():  # who cannot handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_lines(text: str) -> str:
    """The end of a terminal's text, without colours and what was drawn over."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rpartition("\r")[2].rstrip() for line in plain.replace("\r\n", "\n").split("\n")]
    return "\n".join([line for line in lines if line][-LAST_LINES:])
