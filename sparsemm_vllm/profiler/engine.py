"""The engine that a profile is measured in: SPARSEMM records attention and prunes nothing.

vLLM and transformers are imported in functions: they take seconds, and `prepare_process` sets what
they read of the environment before.
"""

import argparse
from typing import Any, NoReturn

from sparsemm_vllm.environment import has_gpu, use_cpu
from sparsemm_vllm.profiler.attention import first_line
from sparsemm_vllm.profiler.errors import ProfilerError

MAX_MODEL_LEN = 8192  # tokens; pictures with questions are shorter
CPU_CACHE = 1 << 30  # bytes


def check_model(model: str, options: dict[str, Any]) -> Any:
    """Refuse a model that cannot be profiled, before an engine is started.

    Args:
        model: name or folder.
        options: engine options, as `vllm.LLM` takes them.

    Returns:
        Its transformers config.

    Raises:
        ProfilerError: if it cannot be read, takes no pictures, is of an unknown family, or has no
            chat template.
    """
    from transformers import AutoConfig, AutoProcessor

    from sparsemm_vllm.geometry import FAMILIES

    names = {"revision": "revision", "trust_remote_code": "trust_remote_code", "hf_token": "token"}
    given = {theirs: options[ours] for ours, theirs in names.items() if ours in options}
    try:
        config = AutoConfig.from_pretrained(model, **given)
        if not hasattr(config, "vision_config"):
            raise ProfilerError(
                f"model {model!r} takes no pictures (its family is {config.model_type!r}): it has "
                "no visual heads to find"
            )
        if config.model_type not in FAMILIES:
            raise ProfilerError(
                f"model {model!r} is of the family {config.model_type!r}, whose image tokens are "
                f"not known; known: {', '.join(FAMILIES)}"
            )
        processor = AutoProcessor.from_pretrained(model, **given)
    except (OSError, ValueError) as error:
        if isinstance(error, ProfilerError):
            raise
        raise ProfilerError(f"model {model!r}: {first_line(error)}") from None
    templates = (processor.chat_template, processor.tokenizer.chat_template)
    if not any(templates) and "chat_template" not in options:
        raise ProfilerError(
            f"model {model!r} has no chat template: questions cannot be asked; give --chat-template"
        )
    return config


# Nothing is pruned: generated tokens can be recorded too.
DENSE = {"profile": "none", "method": "full"}


def open_engine(
    model: str, config: Any, rows: int, options: dict[str, Any], settings: dict[str, Any] = DENSE
) -> Any:
    """A `vllm.LLM` that records attention.

    CUDA graphs are off: they would replay decode steps without recording. Most of the time goes
    into prefill, which gains little from them.

    Args:
        model: name or folder.
        config: its transformers config.
        rows: queries that are recorded between two readings.
        options: engine options, as `vllm.LLM` takes them; they win over the defaults here.
        settings: settings of SPARSEMM, beside the recording.

    Raises:
        ProfilerError: for options that the profiler sets itself, or if vLLM cannot start.
    """
    fixed = {
        "attention_backend": "SPARSEMM",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "worker_extension_cls": "sparsemm_vllm.profiler.worker.AttentionReader",
        "additional_config": {"sparsemm": settings | {"record_attention": rows}},
    }
    if taken := sorted(fixed.keys() & options.keys()):
        raise ProfilerError(f"--{taken[0].replace('_', '-')} is set by the profiler itself")
    defaults: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1}}
    if getattr(config.get_text_config(), "max_position_embeddings", 0) > MAX_MODEL_LEN:
        defaults["max_model_len"] = MAX_MODEL_LEN
    if not has_gpu():
        defaults |= {"dtype": "float32", "kv_cache_memory_bytes": CPU_CACHE, "max_num_seqs": 16}
    from vllm import LLM

    try:
        return LLM(model=model, **(defaults | options | fixed))
    except (ValueError, RuntimeError, OSError) as error:
        raise ProfilerError(f"vLLM cannot start {model!r}: {first_line(error)}") from error


def parse_engine_options(arguments: list[str]) -> dict[str, Any]:
    """Options of `vllm.LLM` from those of `vllm serve`'s command line; only what is given.

    Raises:
        ProfilerError: for an option that vLLM does not have, or a wrong value.
    """
    if not arguments:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ProfilerError(f"engine options: {first_line(ValueError(message))}")

    parser = Parser(add_help=False)
    EngineArgs.add_cli_args(parser)
    parser.add_argument("--chat-template")
    not_given = object()  # argparse fills in defaults of what a namespace lacks
    names = vars(parser.parse_args([]))
    found = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, not_given)))
    options = {name: value for name, value in vars(found).items() if value is not not_given}
    if "model" in options:
        raise ProfilerError("name the model once, before the engine's options")
    return options


def prepare_process() -> None:
    """Make this process ready for vLLM; before vllm or triton are imported, here or by others."""
    if not has_gpu():
        use_cpu()
