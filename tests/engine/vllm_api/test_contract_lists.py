"""Whatever ours stands in place of, calls or wraps is recorded, and passes everything on."""

import ast
import importlib
import inspect
from importlib.metadata import version
from types import FunctionType

import pytest
from vllm.v1.request import Request

from sparsemm_vllm.engine.vllm_api import contract, sources
from sparsemm_vllm.engine.vllm_api.contract import OVERRIDES, nearest, recorded
from sparsemm_vllm.engine.vllm_api.hooks import IN_EVERY_PROCESS, IN_WORKERS

METHODS = FunctionType, classmethod, staticmethod, property


def our_classes() -> dict[str, type]:
    """Classes of ours that extend one of vLLM's, by path."""
    classes = {}
    for name in sources.modules():
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for ours in vars(module).values():
            if not inspect.isclass(ours) or ours.__module__ != name:
                continue
            if any(base.__module__.startswith("vllm.") for base in ours.__mro__):
                classes[f"{name}:{ours.__name__}"] = ours
    return classes


@pytest.mark.parametrize("path", sorted(our_classes()))
def test_every_method_in_place_of_vllms_is_recorded(path: str) -> None:
    ours = our_classes()[path]
    if issubclass(ours, Exception):
        return
    assert path in OVERRIDES, "say in whose place vLLM calls it"
    for i, base in enumerate(ours.__mro__):
        if not base.__module__.startswith("sparsemm_vllm."):
            continue
        listed = OVERRIDES[f"{base.__module__}:{base.__name__}"]
        written = sources.methods(f"{base.__module__}:{base.__name__}")  # dataclasses make some
        for name, method in vars(base).items():
            if not isinstance(method, METHODS) or name not in written:
                continue
            theirs = [
                t
                for t in ours.__mro__[i + 1 :]
                if t.__module__.startswith("vllm.") and name in vars(t)
            ]
            if theirs and path not in contract.OURS_TO_CONSTRUCT:
                symbols = {f"{one}.{name}" for one in listed}
                assert symbols & nearest(version("vllm")).signatures.keys(), f"{path}.{name}"


IN_PLACE = [path for path in sorted(our_classes()) if path in OVERRIDES]


@pytest.mark.parametrize("path", IN_PLACE)
def test_methods_in_place_of_vllms_say_so(path: str) -> None:
    """`@override` stands on each of them, and on no other."""
    known = set().union(*(contract.signatures for contract in recorded()))
    for name in sources.methods(path).keys() - {"__init__"}:
        says_so = getattr(getattr(our_classes()[path], name), "__override__", False)
        assert says_so == any(f"{base}.{name}" in known for base in OVERRIDES[path]), name


def test_imports_and_calls_are_read_from_the_source() -> None:
    imported = sources.imported()
    assert {
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
        "vllm:LLM",
    } <= imported.keys()
    calls = imported["vllm.utils.math_utils:cdiv"]
    assert any("scheduler/manager.py" in call.where for call in calls)
    assert set(imported) <= nearest(version("vllm")).signatures.keys()


def test_methods_that_are_called_are_called() -> None:
    for symbol in contract.CALLED:
        assert sources.calls_of(symbol.rpartition(".")[2]), symbol


def test_vllms_request_still_tells_its_length() -> None:
    assert contract.resolve("vllm.v1.request:Request.num_tokens") == (Request, "num_tokens")


def test_whatever_stands_around_a_function_of_vllms_passes_everything_on() -> None:
    """Wrappers, and methods that call the one they replace: a new parameter goes through.

    But for attention itself, which must not ignore what it does not know.
    """
    around = {}
    for hook in (*IN_EVERY_PROCESS, *IN_WORKERS):
        name = hook.symbol.replace(":", ".").rpartition(".")[2]
        around[name], _ = sources.wrapper(hook.wrapper, name)
    for ours in OVERRIDES:
        methods = sources.methods(ours)
        for name, _ in sources.super_calls(ours):
            if name in methods and name != "forward":
                around[f"{ours}.{name}"] = methods[name]
    assert len(around) > 20
    kinds = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    narrow = [n for n, s in around.items() if not kinds <= {p.kind for p in s.parameters.values()}]
    assert narrow == []


def passes_on(node: ast.AST, name: str) -> bool:
    """Whether all calls of `original`, or of a base class's method of the name, have both stars."""
    calls = [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("original", "look_up", f"super().{name}")
    ]
    return bool(calls) and all(
        any(isinstance(a, ast.Starred) for a in call.args)
        and any(k.arg is None for k in call.keywords)
        for call in calls
    )


def test_nothing_of_what_is_passed_on_is_left_out() -> None:
    checked = []
    for hook in (*IN_EVERY_PROCESS, *IN_WORKERS):
        factory = sources._definition(*hook.wrapper.split(":"))
        checked.append((hook.symbol, passes_on(factory, "")))
    for ours in OVERRIDES:
        called = {name for name, _ in sources.super_calls(ours)} - {"forward", "__post_init__"}
        for node in sources._class(ours).body:
            if isinstance(node, sources.FUNCTIONS) and node.name in called:
                checked.append((f"{ours}.{node.name}", passes_on(node, node.name)))
    assert len(checked) > 20
    assert [name for name, all_of_it in checked if not all_of_it] == []
