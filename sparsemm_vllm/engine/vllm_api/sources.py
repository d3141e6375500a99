"""What our source does with vLLM, read without importing it.

Our modules may fail to import in a release of vLLM that they were not written for.
"""

import ast
from collections.abc import Iterator
from functools import cache
from inspect import Signature
from pathlib import Path

from sparsemm_vllm.engine.vllm_api.signatures import CallSite, from_definition

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef
ROOT = Path(__file__).parents[2]


@cache
def modules() -> dict[str, ast.Module]:
    """Our modules by name, also those that use nothing of vLLM's."""
    trees = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join((ROOT.name, *parts)).removesuffix(".__init__")
        trees[name] = ast.parse(file.read_text("utf-8"))
    return trees


@cache
def imported() -> dict[str, list[CallSite]]:
    """What any of our modules imports from vLLM, ``module:name``, and where it is called."""
    found: dict[str, list[CallSite]] = {}
    for module, tree in modules().items():
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    path = f"{node.module}:{alias.name}"
                    names[alias.asname or alias.name] = path
                    found.setdefault(path, [])
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
                path = names[node.func.id]  # type: ignore[attr-defined]
                found[path].append(CallSite.read(node, _where(module)))
    return found


def methods(path: str) -> dict[str, Signature]:
    """The functions that a class of ours defines, by name.

    Args:
        path: class, ``module:name``.
    """
    return {
        node.name: from_definition(node)
        for node in _class(path).body
        if isinstance(node, FUNCTIONS) and (node.name == "__init__" or "__" not in node.name)
    }


def super_calls(path: str) -> Iterator[tuple[str, CallSite]]:
    """What a class of ours calls of the class that it extends."""
    where = _where(path.partition(":")[0])
    for node in ast.walk(_class(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            value = node.func.value
            if isinstance(value, ast.Call) and getattr(value.func, "id", None) == "super":
                yield node.func.attr, CallSite.read(node, where)


def calls_of(name: str) -> list[CallSite]:
    """Our calls of a method of that name, of whatever object."""
    return _method_calls().get(name, [])


@cache
def _method_calls() -> dict[str, list[CallSite]]:
    """All our calls of methods, by name."""
    found: dict[str, list[CallSite]] = {}
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                found.setdefault(node.func.attr, []).append(CallSite.read(node, _where(module)))
    return found


def wrapper(path: str, name: str) -> tuple[Signature, list[str]]:
    """The function of that name that a function of ours returns.

    Args:
        path: function of ours, ``module:name``.
        name: name of what it returns.

    Returns:
        Its signature, and the arguments of the wrapped function that it asks for by `argument`.
    """
    tree = _definition(*path.split(":"))
    asked = [
        str(node.args[1].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "argument"
        and isinstance(node.args[1], ast.Constant)
    ]
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and node.name == name:
            return from_definition(node), asked
    raise LookupError(f"{path} defines no {name}")


def _class(path: str) -> ast.ClassDef:
    module, _, name = path.partition(":")
    for node in _module(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{path} is no class of ours")


def _definition(module: str, name: str) -> Function:
    for node in _module(module).body:
        if isinstance(node, FUNCTIONS) and node.name == name:
            return node
    raise LookupError(f"{module} defines no function {name}")


def _module(name: str) -> ast.Module:
    if name not in modules():
        raise LookupError(f"{name} is no module of ours")
    return modules()[name]


def _where(module: str) -> str:
    return module.replace(".", "/") + ".py"
