"""Signatures of functions: as text, what changed between two, and which calls a third refuses.

A signature is compared without its annotations. Its text is what stands between the parentheses of
`def`: ``self, request, max_cache_hit_length=None``. A default that is no plain literal is ``...``.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

BOUND = ("self", "cls")  # names of a method's first parameter, which no caller gives
BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class _Default:
    """A default that is no plain literal."""

    def __repr__(self) -> str:
        return "..."


ANY_DEFAULT = _Default()


def signature_of(holder: Any, name: str) -> Signature:
    """The signature of an attribute, `self` or `cls` included, below whatever we put around it.

    Decorators that vLLM itself puts around a function are followed: what they wrap takes the call.

    Args:
        holder: class or module that has it.
        name: attribute name.

    Raises:
        TypeError: if it cannot be called.
        ValueError: if it is a built-in that does not tell.
    """
    # A module may make what it holds when it is asked for.
    found = inspect.getattr_static(holder, name, None) or getattr(holder, name)
    if isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    return _plain(inspect.signature(found))


def _plain(signature: Signature) -> Signature:
    """The same signature, with no annotations and no defaults but literals."""
    return Signature(
        [
            p.replace(annotation=Parameter.empty, default=_literal(p.default))
            for p in signature.parameters.values()
        ]
    )


def _literal(default: Any) -> Any:
    if default is Parameter.empty:
        return default
    try:
        ast.literal_eval(repr(default))
    except (SyntaxError, ValueError):
        return ANY_DEFAULT
    return default


def to_text(signature: Signature) -> str:
    """What stands between the parentheses."""
    return str(_plain(signature)).removeprefix("(").removesuffix(")")


def from_text(text: str) -> Signature:
    """The signature that `to_text` wrote."""
    (function,) = ast.parse(f"def f({text}): ...").body
    assert isinstance(function, ast.FunctionDef)
    return from_definition(function)


def from_definition(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature:
    """The signature of a function's source, without running it."""
    given = function.args
    parameters = []
    positional = [*given.posonlyargs, *given.args]
    missing = [None] * (len(positional) - len(given.defaults))
    for i, (argument, default) in enumerate(
        zip(positional, [*missing, *given.defaults], strict=True)
    ):
        kind = BY_POSITION[i >= len(given.posonlyargs)]
        parameters.append(Parameter(argument.arg, kind, default=_default(default)))
    if given.vararg:
        parameters.append(Parameter(given.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append(
            Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=_default(default))
        )
    if given.kwarg:
        parameters.append(Parameter(given.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return Parameter.empty
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ANY_DEFAULT
    return ANY_DEFAULT if value is ... else value


def changes(before: Signature, after: Signature) -> list[str]:
    """What a caller or a wrapper would notice: a phrase for each parameter that is not the same."""
    old, new = before.parameters, after.parameters
    found = [f"no longer takes {p}" for p in old.values() if p.name not in new]
    for place, p in enumerate(new.values()):
        if p.name not in old:
            displaces = any(q.name in old for q in list(new.values())[place + 1 :])
            where = f" in place {place}" if p.kind in BY_POSITION and displaces else ""
            found.append(f"takes the new parameter {p}{where}")
            continue
        was = old[p.name]
        if p.kind != was.kind:
            found.append(f"takes {p.name} {_how(p)} now, {_how(was)} before")
        elif p.kind in BY_POSITION and place != (previous := list(old).index(p.name)):
            found.append(f"takes {p.name} in place {place} now, in place {previous} before")
        if p.default is not Parameter.empty and was.default is Parameter.empty:
            found.append(f"has the default {p.default!r} for {p.name} now")
        elif p.default is Parameter.empty and was.default is not Parameter.empty:
            found.append(f"has no default for {p.name} any more")
        elif p.default is not was.default and repr(p.default) != repr(was.default):
            found.append(f"has the default {p.default!r} for {p.name} now, {was.default!r} before")
    return found


def _how(p: Parameter) -> str:
    return {
        Parameter.POSITIONAL_ONLY: "by position only",
        Parameter.POSITIONAL_OR_KEYWORD: "by position and by name",
        Parameter.VAR_POSITIONAL: "for any further positions",
        Parameter.KEYWORD_ONLY: "by name only",
        Parameter.VAR_KEYWORD: "for any further names",
    }[p.kind]


def refused(ours: Signature, theirs: Signature) -> list[str]:
    """Calls that a function takes, and another in its place does not take or would misread.

    Args:
        ours: signature of the function that stands in its place, `self` included.
        theirs: signature of the function that callers know.

    Returns:
        A phrase for each such call; empty if every call may go to ours.
    """
    mine, wanted = _ordinary(ours), _ordinary(theirs)
    rest, names = _has(ours, Parameter.VAR_POSITIONAL), _has(ours, Parameter.VAR_KEYWORD)
    any_position = _has(theirs, Parameter.VAR_POSITIONAL)
    any_name = _has(theirs, Parameter.VAR_KEYWORD)
    places = [p for p in mine.values() if p.kind in BY_POSITION]
    found = []
    for place, p in enumerate(wanted.values()):
        same = mine.get(p.name)
        if p.kind in BY_POSITION:
            if place < len(places):
                if places[place].name != p.name and not {p.name, places[place].name} <= set(BOUND):
                    found.append(f"{p.name} in place {place}, where ours has {places[place].name}")
            elif not rest or same is not None:
                found.append(f"{p.name} by position")
        if p.name in BOUND:
            continue
        if p.kind in BY_NAME and (not names if same is None else same.kind not in BY_NAME):
            found.append(f"{p.name} by name")
        needed = same is not None and same.default is Parameter.empty
        if needed and p.default is not Parameter.empty:
            found.append(f"no {p.name}, which has a default")
    if any_position and not rest:
        found.append("any number of positions")
    if any_name and not names:
        found.append("any name")
    taken = sum(p.kind in BY_POSITION for p in wanted.values())
    misread = {p.name for p in places[taken:] if any_position}
    for p in mine.values():
        same = wanted.get(p.name)
        if same is None and p.default is Parameter.empty and p.name not in BOUND:
            found.append(f"no {p.name}, which ours needs")
            continue
        by_name = same is not None and same.kind in BY_NAME
        if any_name and not by_name and p.kind in BY_NAME and p.name not in BOUND:
            misread.add(p.name)
    return found + [f"what ours would read as {name}" for name in sorted(misread)]


def _ordinary(signature: Signature) -> dict[str, Parameter]:
    """Parameters for one argument each."""
    return {
        p.name: p
        for p in signature.parameters.values()
        if p.kind in (*BY_POSITION, Parameter.KEYWORD_ONLY)
    }


def _has(signature: Signature, kind: Any) -> bool:
    return any(p.kind == kind for p in signature.parameters.values())


@dataclass(frozen=True)
class CallSite:
    """A call in our source.

    Attributes:
        where: file and line.
        positions: arguments given by position, `self` not among them.
        names: arguments given by name.
        open: whether more may follow, by ``*`` or ``**``.
    """

    where: str
    positions: int
    names: tuple[str, ...]
    open: bool

    @classmethod
    def read(cls, node: ast.Call, where: str) -> "CallSite":
        """The call of a source."""
        starred = any(isinstance(a, ast.Starred) for a in node.args)
        names = tuple(k.arg for k in node.keywords if k.arg is not None)
        return cls(
            f"{where}:{node.lineno}",
            sum(not isinstance(a, ast.Starred) for a in node.args),
            names,
            starred or len(names) < len(node.keywords),
        )

    def fails(self, theirs: Signature, before: Signature | None = None) -> list[str]:
        """Why the call does not reach the function as it was meant to; empty if it does.

        Args:
            theirs: signature of the function that is called.
            before: its signature when the call was written; another parameter in the place of one
                that is given by position is found only with it.
        """
        parameters = [p for p in _ordinary(theirs).values() if p.name not in BOUND]
        places = [p for p in parameters if p.kind in BY_POSITION]
        found = []
        if self.positions > len(places) and not _has(theirs, Parameter.VAR_POSITIONAL):
            found.append(f"gives {self.positions} positions")
        if not _has(theirs, Parameter.VAR_KEYWORD):
            by_name = {p.name for p in parameters if p.kind in BY_NAME}
            found += [f"gives {name}" for name in self.names if name not in by_name]
        given = {p.name for p in places[: self.positions]} | set(self.names)
        if not self.open:
            found += [
                f"gives no {p.name}"
                for p in parameters
                if p.default is Parameter.empty and p.name not in given
            ]
        if before is not None:
            meant = list(_places(before))[: self.positions]
            found += [
                f"means {was} where {now} is now"
                for was, now in zip(meant, _places(theirs), strict=False)
                if was != now
            ]
        return [f"{self.where} {problem}" for problem in found]


def _places(signature: Signature) -> Iterator[str]:
    for p in signature.parameters.values():
        if p.kind in BY_POSITION and p.name not in BOUND:
            yield p.name


def argument(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A reader of one argument of calls of a function, however it is given.

    Args:
        function: function that is called, `self` included if it is a method.
        name: name of its parameter.

    Returns:
        A function of the call's arguments, which returns the argument or its default.

    Raises:
        TypeError: if the function has no such parameter.
    """
    signature = inspect.signature(function)
    if name not in signature.parameters:
        raise TypeError(f"{function.__qualname__} takes no {name}")

    def read(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments[name]

    return read
