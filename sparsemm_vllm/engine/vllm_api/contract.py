"""What SPARSEMM assumes of vLLM's functions: their exact signatures, recorded for each release.

`contracts/vllm-0.33.json` has the signature of every function that SPARSEMM wraps, overrides or
calls, as it is in that release, and what our classes inherit: methods, and flags with their values.
Of the installed vLLM, `compare` tells what is different, and whether that breaks SPARSEMM: whether
vLLM makes a call that a function of ours refuses, or we make one that vLLM refuses. A function of
ours that stands in the place of one of vLLM's must take every call that vLLM's takes, by position
and by name.

`sparsemm check --record FILE` writes such a file.
"""

import importlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from inspect import Signature
from pathlib import Path
from typing import Any

from packaging.version import Version

from sparsemm_vllm.engine.vllm_api import sources
from sparsemm_vllm.engine.vllm_api.signatures import (
    CallSite,
    changes,
    from_text,
    refused,
    signature_of,
    to_text,
)
from sparsemm_vllm.files import write_whole

FOLDER = Path(__file__).parent / "contracts"
NO_SIGNATURE = "..."  # stands for what tells no signature, and for what only must be there
VALUE = "= "  # before the value of a flag
INHERITED = "inherited"

# Classes of ours and those of vLLM in whose place vLLM calls them. Every method that both have is
# overridden. A test holds this against the classes.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "sparsemm_vllm.engine.cpu.attention:TorchMetadataBuilder": (
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
    ),
    "sparsemm_vllm.engine.cpu.attention:TorchAttentionImpl": (
        "vllm.v1.attention.backend:AttentionImpl",
    ),
    "sparsemm_vllm.engine.cpu.attention:TorchAttentionBackend": (
        "vllm.v1.attention.backend:AttentionBackend",
    ),
    "sparsemm_vllm.engine.cpu.attention:SparseMMMetadataBuilder": (
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
    ),
    "sparsemm_vllm.engine.cpu.attention:SparseMMBackend": (
        "vllm.v1.attention.backend:AttentionBackend",
    ),
    "sparsemm_vllm.engine.cpu.platform:SparseMMCpuPlatform": ("vllm.platforms.cpu:CpuPlatform",),
    "sparsemm_vllm.engine.attention.cuda:SparseMMMetadataBuilder": (
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder",
    ),
    "sparsemm_vllm.engine.attention.cuda:SparseMMImpl": (
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
    ),
    "sparsemm_vllm.engine.attention.cuda:SparseMMBackend": (
        "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend",
    ),
    "sparsemm_vllm.engine.frontend.page:SparseMMPage": (
        "vllm.plugins.endpoint_plugins.interface:EndpointPlugin",
    ),
    "sparsemm_vllm.engine.scheduler.manager:SparseMMManager": (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
    ),
    "sparsemm_vllm.engine.spec:SparseMMSpec": ("vllm.v1.kv_cache_interface:FullAttentionSpec",),
    "sparsemm_vllm.engine.frontend.metrics:SparseMMStatLogger": (
        "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
    ),
    "sparsemm_vllm.engine.worker.model_state:SparseMMModelState": (
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
    ),
    "sparsemm_vllm.engine.attention.backend:SparseBackendMixin": (
        "vllm.v1.attention.backend:AttentionBackend",
        "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend",
    ),
}
OURS_TO_CONSTRUCT = (
    "sparsemm_vllm.engine.frontend.metrics:SparseMMStatLogger",
)  # vLLM constructs the others
# Methods that we call on objects of vLLM's, under names that nothing else of ours has.
CALLED = (
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
    "vllm.v1.core.encoder_cache_manager:EncoderCacheManager.get_cached_input_ids",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager._remove_blocks_in_range",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
    "vllm.v1.request:Request.get_num_encoder_embeds",
    "vllm.config:ModelConfig.get_num_attention_heads",
    "vllm.config:ModelConfig.get_num_kv_heads",
    "vllm.config:ModelConfig.get_total_num_hidden_layers",
    "vllm.config:ModelConfig.get_total_num_kv_heads",
)


@dataclass(frozen=True)
class Contract:
    """A release and the signatures of what SPARSEMM needs of it.

    Attributes:
        vllm: version of vLLM that was recorded.
        signatures: texts of `signatures.to_text` by symbol, ``module:qualified.name``.
    """

    vllm: str
    signatures: dict[str, str]

    def save(self, file: Path) -> None:
        """Write it, a symbol a line.

        Raises:
            OSError: naming the file, if it cannot be written.
        """
        write_whole(file, json.dumps(asdict(self), indent=1))


@dataclass
class Use:
    """What SPARSEMM does with a symbol of vLLM's.

    Attributes:
        kinds: ``wrapped``, ``overridden``, ``called`` or ``imported``, the weightiest first.
        stands_in: our functions that take its calls, by name.
        reads: names of its parameters that ours ask for.
        calls: our calls of it.
    """

    kinds: list[str] = field(default_factory=list)
    stands_in: dict[str, Signature] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    calls: list[CallSite] = field(default_factory=list)

    def breaks(self, before: Signature | None, after: Signature) -> list[str]:
        """Why SPARSEMM fails where its signature changed; empty if all calls still go through.

        Args:
            before: recorded signature.
            after: signature in the installed vLLM.
        """
        found = [
            f"{name} does not take {call}"
            for name, ours in self.stands_in.items()
            for call in refused(ours, after)
        ]
        found += [f"SPARSEMM reads {name}" for name in self.reads if name not in after.parameters]
        return found + [problem for call in self.calls for problem in call.fails(after, before)]


@dataclass(frozen=True)
class Difference:
    """A symbol that is not as it was recorded.

    Attributes:
        symbol: path of the symbol, ``module:qualified.name``.
        kind: use that SPARSEMM makes of it, as in `Use.kinds`, or `INHERITED`.
        what: changes, as phrases.
        breaks: reasons why SPARSEMM fails with it; empty if it does not.
    """

    symbol: str
    kind: str
    what: tuple[str, ...]
    breaks: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.symbol} {', '.join(self.what)}"
        return f"{text} ({'; '.join(self.breaks)})" if self.breaks else text


def resolve(symbol: str) -> tuple[Any, str]:
    """The object that holds a symbol of vLLM's, and its attribute name there.

    Raises:
        ImportError, AttributeError: if it is gone.
    """
    module, _, qualified = symbol.partition(":")
    *parents, name = qualified.split(".")
    holder: Any = importlib.import_module(module)
    for parent in parents:
        holder = getattr(holder, parent)
    getattr(holder, name)
    return holder, name


def recorded() -> list[Contract]:
    """The contracts of all supported releases, oldest first."""
    files = (json.loads(file.read_text("utf-8")) for file in FOLDER.glob("*.json"))
    contracts = [Contract(found["vllm"], found["signatures"]) for found in files]
    return sorted(contracts, key=lambda contract: Version(contract.vllm))


def nearest(installed: str) -> Contract:
    """The contract of a version's release; else of the newest before it, else the oldest.

    Args:
        installed: version of vLLM.
    """
    release = Version(installed).release[:2]
    contracts = recorded()
    before = [c for c in contracts if Version(c.vllm).release[:2] <= release]
    return before[-1] if before else contracts[0]


def uses(hooks: Iterable[Any]) -> dict[str, Use]:
    """Everything that SPARSEMM wraps, overrides, calls or imports of vLLM, by symbol.

    Args:
        hooks: functions that are wrapped; see `hooks.Hook`.
    """
    found: dict[str, Use] = {}

    def use(symbol: str, kind: str) -> Use:
        entry = found.setdefault(symbol, Use())
        if kind not in entry.kinds:
            entry.kinds.append(kind)
        return entry

    for hook in hooks:
        name = hook.symbol.replace(":", ".").rpartition(".")[2]
        ours, reads = sources.wrapper(hook.wrapper, name)
        use(hook.symbol, "wrapped").stands_in[hook.wrapper.replace(":", ".")] = ours
        use(hook.symbol, "wrapped").reads += reads
    for ours_path, bases in OVERRIDES.items():
        methods = sources.methods(ours_path)
        for base in bases:
            for name, ours in methods.items():
                if name == "__init__" and ours_path in OURS_TO_CONSTRUCT:
                    continue
                use(f"{base}.{name}", "overridden").stands_in[f"{ours_path}.{name}"] = ours
        for name, call in sources.super_calls(ours_path):
            use(f"{bases[0]}.{name}", "called").calls.append(call)
    for symbol in CALLED:
        use(symbol, "called").calls += sources.calls_of(symbol.rpartition(".")[2])
    for symbol, calls in sources.imported().items():
        use(symbol, "called" if calls else "imported").calls += calls
    return found


def record(hooks: Iterable[Any]) -> Contract:
    """The contract of the installed vLLM.

    Args:
        hooks: functions that are wrapped.

    Raises:
        ImportError, AttributeError: if it lacks a function that SPARSEMM wraps or calls.
    """
    found = {}
    for symbol, use in uses(hooks).items():
        try:
            found[symbol] = _text(symbol, use.kinds != ["imported"])
        except AttributeError:
            if use.kinds != ["overridden"]:
                raise  # else a method of ours that stands in no place of vLLM's
    for symbol in _inherited():
        if symbol not in found:
            found[symbol] = _text(symbol)
    return Contract(version("vllm"), dict(sorted(found.items())))


def _inherited() -> list[str]:
    """What classes of vLLM's that ours extend have, in the installed one."""
    symbols = []
    for base in dict.fromkeys(base for bases in OVERRIDES.values() for base in bases):
        holder, name = resolve(base)
        cls = getattr(holder, name)
        theirs = [c for c in cls.__mro__ if c.__module__.startswith("vllm")]
        names = {name for c in theirs for name in vars(c) if not name.startswith("_")}
        symbols += [f"{base}.{name}" for name in sorted(names)]
    return symbols


def is_recorded(symbol: str) -> bool:
    """Whether a function of the installed vLLM is as it was in any supported release.

    Args:
        symbol: path of the function, ``module:qualified.name``.
    """
    try:
        text = _text(symbol)
    except (ImportError, AttributeError):
        return False
    return any(known.signatures.get(symbol) == text for known in recorded())


def _text(symbol: str, wanted: bool = True) -> str:
    """The text of a symbol's signature in the installed vLLM.

    Args:
        symbol: path of the symbol, ``module:qualified.name``.
        wanted: whether its signature counts, and not only that it is there.
    """
    holder, name = resolve(symbol)
    value = getattr(holder, name)
    if not wanted:
        return NO_SIGNATURE
    if not callable(value):
        return f"{VALUE}{value!r}" if isinstance(value, (bool, int, str)) else NO_SIGNATURE
    try:
        return to_text(signature_of(holder, name))
    except ValueError:  # a built-in
        return NO_SIGNATURE


def compare(
    contract: Contract, hooks: Iterable[Any], loaded_only: bool = False
) -> list[Difference]:
    """What is not in the installed vLLM as it was recorded.

    Args:
        contract: recorded signatures.
        hooks: functions that are wrapped.
        loaded_only: whether to look only into modules that this process has imported, and not for
            methods of vLLM's that are new under the name of one of ours. Takes milliseconds if
            nothing differs, and then reads no source.
    """
    differing: dict[str, str | None] = {}
    for symbol, before in contract.signatures.items():
        if loaded_only and symbol.partition(":")[0] not in sys.modules:
            continue
        try:
            now = _text(symbol, before != NO_SIGNATURE)
        except Exception as error:  # a module of another release may fail in any way, and is listed
            differing[symbol] = f"{type(error).__name__}: {error}"
            continue
        if now != before:
            differing[symbol] = None
    if loaded_only and not differing:
        return []
    known = uses(hooks)
    found = [_difference(symbol, contract, known, gone) for symbol, gone in differing.items()]
    return found if loaded_only else found + _new(contract, known)


def _difference(
    symbol: str, contract: Contract, known: dict[str, Use], gone: str | None
) -> Difference:
    use = known.get(symbol, Use())
    kind = use.kinds[0] if use.kinds else INHERITED
    if gone is not None:
        broken = ("SPARSEMM needs it",) if use.kinds else ()
        return Difference(symbol, kind, (f"is gone: {gone}",), broken)
    text, now_text = contract.signatures[symbol], _text(symbol)
    if {text[:2], now_text[:2]} & {VALUE} or NO_SIGNATURE in (text, now_text):
        what = f"is `{now_text.removeprefix(VALUE)}` now, `{text.removeprefix(VALUE)}` before"
        return Difference(symbol, kind, (what,), ())
    before, now = from_text(text), from_text(now_text)
    return Difference(symbol, kind, tuple(changes(before, now)), tuple(use.breaks(before, now)))


def _new(contract: Contract, known: dict[str, Use]) -> list[Difference]:
    """What vLLM's classes have now and had not: replaced by ours by chance, or inherited."""
    found = []
    for symbol, use in known.items():
        if use.kinds[0] != "overridden" or symbol in contract.signatures:
            continue
        try:
            resolve(symbol)
        except (ImportError, AttributeError):
            continue
        names = tuple(f"{name} stands in its place by chance" for name in use.stands_in)
        found.append(Difference(symbol, "overridden", ("is new",), names))
    listed = {*contract.signatures, *(difference.symbol for difference in found)}
    for symbol in _inherited():
        if symbol not in listed:
            text = f"is new: ours inherits it ({_text(symbol).removeprefix(VALUE)})"
            found.append(Difference(symbol, INHERITED, (text,), ()))
    return found
