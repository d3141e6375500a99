"""Signatures as text, what changed between two, and which calls a third refuses."""

import ast
import functools
from inspect import Parameter, Signature
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_vllm.engine.vllm_api.signatures import (
    CallSite,
    argument,
    changes,
    from_text,
    refused,
    signature_of,
    to_text,
)

TEXTS = [
    "",
    "self, request",
    "self, request, max_cache_hit_length=None",
    "a, /, b, *, c=1, d",
    "a, b='x, y', *rest, c=-1.5, **others",
    "cls, dtype=...",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_it_was_written(text: str) -> None:
    assert to_text(from_text(text)) == text


class Holder:
    @staticmethod
    def static(a: int, b: float = float("inf")) -> None: ...

    @classmethod
    def of_class(cls, a: int) -> None: ...

    def plain(self, a: "list[int]", *, b: bool = True) -> None: ...

    @functools.lru_cache  # noqa: B019
    def decorated(self, a: int) -> None: ...


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("static", "a, b=..."),
        ("of_class", "cls, a"),
        ("plain", "self, a, *, b=True"),
        ("decorated", "self, a"),
    ],
)
def test_signatures_keep_self_and_lose_annotations(name: str, text: str) -> None:
    assert to_text(signature_of(Holder, name)) == text


@pytest.mark.parametrize(
    ("before", "after", "phrases"),
    [
        ("self, a", "self, a", []),
        ("self, a", "self, a, b=None", ["takes the new parameter b=None"]),
        (
            "self, a",
            "self, b, a",
            ["takes the new parameter b in place 1", "takes a in place 2 now, in place 1 before"],
        ),
        ("a, b", "b, a", ["takes b in place 0 now, in place 1 before",
                          "takes a in place 1 now, in place 0 before"]),
        ("a, b=1", "a", ["no longer takes b=1"]),
        ("a, b=1", "a, b", ["has no default for b any more"]),
        ("a, b", "a, b=2", ["has the default 2 for b now"]),
        ("a=1", "a=True", ["has the default True for a now, 1 before"]),
        ("a, b", "a, *, b", ["takes b by name only now, by position and by name before"]),
        ("a, **rest", "a", ["no longer takes **rest"]),
    ],
)  # fmt: skip
def test_changes(before: str, after: str, phrases: list[str]) -> None:
    assert changes(from_text(before), from_text(after)) == phrases


@pytest.mark.parametrize(
    ("ours", "theirs", "calls"),
    [
        ("self, request", "self, request", []),
        # What 0.33 did: the engine died of it.
        (
            "self, request",
            "self, request, max_cache_hit_length=None",
            ["max_cache_hit_length by position", "max_cache_hit_length by name"],
        ),
        ("self, request, *args, **kwargs", "self, request, max_cache_hit_length=None", []),
        ("self, request, **kwargs", "self, request, limit=None", ["limit by position"]),
        ("self, request, *args", "self, request, limit=None", ["limit by name"]),
        # By position it would end among the rest, and ours would read its own default.
        ("self, a, *args, b=1, **kwargs", "self, a, b=1", ["b by position"]),
        ("self, b, a", "self, a, b", ["a in place 1, where ours has b",
                                      "b in place 2, where ours has a"]),
        ("self, a, b", "self, a, b=1", ["no b, which has a default"]),
        ("self, a, c", "self, a", ["no c, which ours needs"]),
        ("self, a", "self, a, *rest, **names", ["any number of positions", "any name"]),
        ("self, a, *, b=1", "self, a, *, b=1", []),
        # What is meant for the rest would end in a parameter of ours.
        ("self, b=None, *rest", "self, *rest, b=None", ["what ours would read as b"]),
        ("self, b=None, **names", "self, **names", ["what ours would read as b"]),
        ("self, a, **names", "self, a, /, **names", ["what ours would read as a"]),
        ("cls, a", "self, a", []),
    ],
)  # fmt: skip
def test_refused_calls(ours: str, theirs: str, calls: list[str]) -> None:
    assert refused(from_text(ours), from_text(theirs)) == calls


names = st.sampled_from("abcde")
kinds = st.sampled_from(
    [
        Parameter.POSITIONAL_ONLY,
        Parameter.POSITIONAL_OR_KEYWORD,
        Parameter.VAR_POSITIONAL,
        Parameter.KEYWORD_ONLY,
        Parameter.VAR_KEYWORD,
    ]
)


@st.composite
def signatures(draw: Any) -> Signature:
    parts = draw(st.lists(st.tuples(names, kinds, st.booleans()), max_size=5))
    parts = list({name: (name, kind, default) for name, kind, default in parts}.values())
    parts.sort(key=lambda p: (p[1], p[2]))
    found: list[Parameter] = []
    optional = False
    for name, kind, default in parts:
        single = kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if single and any(p.kind == kind for p in found):
            continue
        by_position = kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        optional |= by_position and default
        given_default = optional if by_position else default
        value = None if given_default and not single else Parameter.empty
        found.append(Parameter(name, kind, default=value))
    return Signature(found)


@settings(max_examples=1500)  # of ten, one is a call that both take
@given(signatures(), signatures(), st.integers(0, 6), st.sets(names))
def test_a_function_that_refuses_nothing_takes_and_reads_every_call(
    ours: Signature, theirs: Signature, positions: int, keywords: set[str]
) -> None:
    if refused(ours, theirs):
        return
    args, kwargs = range(positions), {name: name.upper() for name in keywords}
    try:
        meant = function(theirs)(*args, **kwargs)
    except TypeError:
        return
    read = function(ours)(*args, **kwargs)
    several = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    for name in ours.parameters.keys() & theirs.parameters.keys():
        if not {ours.parameters[name].kind, theirs.parameters[name].kind} & several:
            assert read[name] == meant[name]


def function(signature: Signature) -> Any:
    """A function of that signature, which returns its arguments."""
    names: dict[str, Any] = {}
    exec(f"def f({to_text(signature)}): return dict(locals())", names)
    return names["f"]


def call(source: str) -> CallSite:
    return CallSite.read(ast.parse(source, mode="eval").body, "ours.py")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "theirs", "before", "problems"),
    [
        ("f(x, y)", "self, a, b", None, []),
        ("f(x, b=y)", "self, a, b", None, []),
        ("f(x, *rest)", "self, a, b, c", None, []),
        ("f(x, y, z)", "self, a, b", None, ["ours.py:1 gives 3 positions"]),
        ("f(x, c=y)", "self, a, b=1", None, ["ours.py:1 gives c"]),
        ("f(x)", "self, a, b", None, ["ours.py:1 gives no b"]),
        ("f(x, y)", "self, b, a", "self, a, b", ["ours.py:1 means a where b is now",
                                                 "ours.py:1 means b where a is now"]),
        ("f(x)", "self, a, c, b=1", "self, a, b=1", ["ours.py:1 gives no c"]),
    ],
)  # fmt: skip
def test_calls(source: str, theirs: str, before: str | None, problems: list[str]) -> None:
    known = None if before is None else from_text(before)
    assert call(source).fails(from_text(theirs), known) == problems


def test_an_argument_is_found_however_it_is_given() -> None:
    def process(a: int, b: int = 2, *, c: int = 3) -> None: ...

    read = argument(process, "b")
    assert [read(1), read(1, 5), read(1, b=6, c=9)] == [2, 5, 6]


def test_an_argument_that_does_not_exist_is_found_before_any_call() -> None:
    with pytest.raises(TypeError, match=r"Holder\.plain takes no resumable"):
        argument(Holder.plain, "resumable")
