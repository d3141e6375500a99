"""Find docstrings that a reader stumbles over: `python .ci/check_docstrings.py FOLDER...`.

Three things are refused in the Python files of the folders:

* a line of "Args:" or "Attributes:" that does not begin with a noun (`rank: among the ranks`),
* a name in "Args:" or "Attributes:" that the function or class does not have, and a parameter that
  is missing where the others are described,
* a method that stands in the place of one of vLLM's and does not carry `@override`. Which methods
  vLLM has is known from the contracts in `sparsemm_vllm/engine/vllm_api`.

Nothing is imported, so this works without vLLM.
"""

import ast
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sparsemm_vllm"
API = ROOT / PACKAGE / "engine" / "vllm_api"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that begin no noun: a line that begins with one leaves the reader to guess the noun.
PREPOSITIONS = _words("""
    about across after against along among around as at because before behind below beside besides
    between beyond by during for from if in inside instead into like near of off on onto out over
    per since than through to under unless until up when while with within without
""")
QUESTIONS = _words("how that what where which who whom whose why")
CONJUNCTIONS = _words("also and but either even exactly just neither not only or so")
VERBS = _words("""
    are continue create do does divides fill give gives has have is keep keeps leave make makes must
    replace see stands take takes was were write writes
""")
NO_NOUN = PREPOSITIONS | QUESTIONS | CONJUNCTIONS | VERBS
PRONOUNS = _words("he it one ones she them these they this those")
DETERMINERS = _words("""
    a all an another any both each either every its most no one other our several some such the
    their these this those
""")
# Said of a noun that has to follow: "held blocks", and not "held by the request".
PARTICIPLE = re.compile(r"\w+[^e]ed|held|kept|given|known|made|seen|shown|sent|taken|written")

PASSED_ON = frozenset({"args", "kwargs"})  # to a function of vLLM's, which says what they are

SECTION = re.compile(r"(Args|Attributes):")
ENTRY = re.compile(r"    ([*\w][*\w, ]*): (.*)")
# Shapes, types and values say no noun: ``[L, Hkv]``, int32.
LITERAL = re.compile(
    r"(``[^`]*``|`[^`]*`|u?int\d*|float\d+|bfloat16|bool)(?![\w'-])[ ,;:.]*(or |and )?"
)
NAME = re.compile(r"`[A-Za-z_][\w.]{3,}`")  # the name of a thing is a noun, a formula's letter not
WORD = re.compile(r"[\w'/-]+")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef


@dataclass(frozen=True)
class Entry:
    """A line of "Args:" or "Attributes:", with the lines that continue it.

    Attributes:
        section: heading above it, `Args` or `Attributes`.
        names: what it describes, one name or several.
        text: text behind the colon.
        line: line of the file, from 1.
    """

    section: str
    names: tuple[str, ...]
    text: str
    line: int


def why_no_noun(name: str, text: str) -> str | None:
    """The reason why a text does not begin with a noun, or None if it may.

    Args:
        name: name that it describes.
        text: text behind the colon.
    """
    if text.rstrip(".").replace(" ", "_") == name:
        return "says no more than the name"
    rest = text
    while match := LITERAL.match(rest):
        if NAME.match(rest):
            return None
        rest = rest[match.end() :]
    return _why_not(rest) if rest else "names no noun"


def _why_not(text: str) -> str | None:
    text = text.lstrip("(")
    first, *others = WORD.findall(text.partition(".")[0])[:2] or [text]
    word = first.lower()
    following = others[0].lower() if others else ""
    alone = not text[len(first) :].startswith(" ")  # a stop or a comma follows, or nothing
    if word in NO_NOUN or word.isdigit():
        return f'begins with "{first}"'
    if (word in PRONOUNS and alone) or "ones" in [word, following]:
        return f'begins with "{first}", which stands for a noun'
    if word in DETERMINERS and (following in NO_NOUN or following == "one"):
        return f'begins with "{first} {following}"'
    if PARTICIPLE.fullmatch(word) and (alone or following in NO_NOUN):
        return f'begins with "{first}", and no noun follows'
    if word.endswith(("'s", "s'")) and alone:
        return f'begins with "{first}", and no noun follows'
    return None


def entries(node: Documented) -> Iterator[Entry | int]:
    """The lines of its sections; of a line that is none, its number in the file."""
    text = ast.get_docstring(node, clean=False)
    if text is None:
        return
    start = node.body[0].lineno
    section = ""
    for number, line in enumerate(_dedented(text), start):
        if match := SECTION.fullmatch(line):
            section = match[1]
        elif line and not line.startswith(" "):
            section = ""
        elif section and re.match(r"    \S", line):
            match = ENTRY.fullmatch(line)
            names = tuple(match[1].replace("*", "").split(", ")) if match else ()
            yield Entry(section, names, match[2], number) if match else number


def _dedented(text: str) -> list[str]:
    first, _, others = text.partition("\n")
    return [first, *textwrap.dedent(others).split("\n")]


def parameters(function: Function, method: bool) -> list[str]:
    """The names that it takes, those of ``*args`` and ``**kwargs`` without their stars.

    Args:
        function: function or method.
        method: whether its first argument is `self` or `cls`.
    """
    arguments = function.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    names = names[1:] if method and not _decorated(function, "staticmethod") else names
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + [more.arg for more in (arguments.vararg, arguments.kwarg) if more]


def _name(node: ast.expr) -> str:
    """The last name of an expression: `field` of ``dataclasses.field(...)``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Call):
        return _name(node.func)
    return _name(node.value) if isinstance(node, ast.Subscript) else getattr(node, "id", "")


def _decorated(node: Documented, name: str) -> bool:
    return name in map(_name, node.decorator_list)


class Classes:
    """The classes of all files, and what each has.

    Args:
        trees: syntax tree of each file.
    """

    def __init__(self, trees: dict[Path, ast.Module]) -> None:
        self._all: dict[str, list[ast.ClassDef]] = {}
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._all.setdefault(node.name, []).append(node)

    def bases(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        """Its base classes among these; those of another package are left out."""
        found = [self._all.get(_name(base), []) for base in node.bases]
        return [known[0] for known in found if len(known) == 1 and known[0] is not node]

    def base_names(self, node: ast.ClassDef) -> set[str]:
        """The names of all its base classes, those of other packages too."""
        return {_name(base) for base in node.bases}.union(
            *(self.base_names(base) for base in self.bases(node))
        )

    def fields(self, node: ast.ClassDef) -> list[str]:
        """The annotated names of a class and of its base classes, in order."""
        found = [name for base in self.bases(node) for name in self.fields(base)]
        return [*found, *filter(None, map(_field, node.body))]

    def takes(self, node: ast.ClassDef) -> list[str]:
        """The parameters that its constructor takes."""
        for item in node.body:
            if isinstance(item, Function) and item.name == "__init__":
                return parameters(item, True)
        if any(map(_field, node.body)) or not self.bases(node):
            return self.fields(node)
        return self.takes(self.bases(node)[0])

    def attributes(self, node: ast.ClassDef) -> set[str]:
        """Everything that an object of it has, by name."""
        found = {*self.fields(node), *filter(None, map(_set_on_self, ast.walk(node)))}
        for item in node.body:
            targets = item.targets if isinstance(item, ast.Assign) else []
            found |= {_name(target) for target in targets} | {getattr(item, "name", "")}
        return found.union(*(self.attributes(base) for base in self.bases(node)))


def _field(node: ast.stmt) -> str:
    """The name of a field that a constructor takes; empty if it is none."""
    if not isinstance(node, ast.AnnAssign) or _name(node.annotation) == "ClassVar":
        return ""
    made = isinstance(node.value, ast.Call) and "init=False" in ast.unparse(node.value)
    return "" if made else _name(node.target)


def _set_on_self(node: ast.AST) -> str:
    """The name that ``self.name = ...`` sets; empty for everything else."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return ""
    return node.attr if _name(node.value) == "self" else ""


def wrong_names(found: list[Entry], has: set[str], takes: list[str]) -> Iterator[tuple[int, str]]:
    """Names that are described and not there, and parameters that are not described.

    Args:
        found: described names.
        has: names that may stand under "Attributes:".
        takes: names that may stand under "Args:", and must if one of them does.
    """
    described = {name for entry in found for name in entry.names}
    for entry in found:
        there = has if entry.section == "Attributes" else takes
        for name in entry.names:
            if name not in there:
                yield entry.line, f"{name}: is described, and there is no such name"
    arguments = [entry for entry in found if entry.section == "Args"]
    for name in takes if arguments else []:
        if name not in described | PASSED_ON and not name.startswith("_"):
            yield arguments[0].line, f"{name}: is not described, and the other parameters are"


def missing_overrides(
    module: str, node: ast.ClassDef, classes: Classes, contract: "Contract"
) -> Iterator[tuple[int, str]]:
    """Methods that stand in the place of vLLM's and do not say so.

    Args:
        module: name of the class's module.
        node: class.
        classes: all classes.
        contract: what is known of vLLM's classes.
    """
    names = classes.base_names(node)
    replaced = contract.overrides.get(f"{module}:{node.name}", ())
    bases = [base for base in replaced if base.split(":")[1] in names]
    for item in node.body:
        if not isinstance(item, Function) or item.name == "__init__":
            continue
        known = [base for base in bases if f"{base}.{item.name}" in contract.symbols]
        if known and not _decorated(item, "override"):
            yield item.lineno, f"{item.name}: overrides {known[0]}.{item.name}, without @override"


@dataclass(frozen=True)
class Contract:
    """What is known of vLLM, as `engine/vllm_api` says it.

    Attributes:
        overrides: vLLM's classes in whose place each class of ours stands, ``module:name``.
        symbols: functions of vLLM's in any supported release, ``module:qualified.name``.
    """

    overrides: dict[str, tuple[str, ...]]
    symbols: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> "Contract":
        """Read it from the folder of the module `contract`."""
        tree = ast.parse((folder / "contract.py").read_text("utf-8"))
        records = [json.loads(file.read_text()) for file in (folder / "contracts").glob("*.json")]
        symbols = frozenset(symbol for record in records for symbol in record["signatures"])
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and _name(node.target) == "OVERRIDES" and node.value:
                return cls(ast.literal_eval(node.value), symbols)
        raise ValueError("contract.py has no OVERRIDES")


def findings(path: Path, tree: ast.Module, classes: Classes) -> Iterator[tuple[int, str]]:
    """What is wrong in the docstrings of a file, with the line of each.

    Args:
        path: file, for nothing but its name in a message.
        tree: its syntax tree.
        classes: all classes.
    """
    methods = {
        item for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, Documented):
            continue
        lines = list(entries(node))
        found = [entry for entry in lines if isinstance(entry, Entry)]
        yield from ((n, "is no `name: text`") for n in lines if isinstance(n, int))
        for entry in found:
            if why := why_no_noun(", ".join(entry.names), entry.text):
                yield entry.line, f"{', '.join(entry.names)}: {why}: {entry.text}"
        if isinstance(node, ast.ClassDef):
            yield from wrong_names(found, classes.attributes(node), classes.takes(node))
        else:
            yield from wrong_names(found, set(), parameters(node, node in methods))


def main(folders: list[str]) -> int:
    """Print what is wrong in the folders; 1 if anything is.

    Args:
        folders: folders and files, absolute or below the current folder.
    """
    paths = sorted(file for name in folders for file in _python_files(Path(name)))
    trees = {path: ast.parse(path.read_text("utf-8")) for path in paths}
    classes = Classes(trees)
    contract = Contract.read(API)
    wrong = 0
    for path, tree in trees.items():
        found = list(findings(path, tree, classes))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found += missing_overrides(_module(path), node, classes, contract)
        for line, message in sorted(found):
            print(f"{path}:{line}: {message}")
        wrong += len(found)
    print(f"{wrong} to mend in {len(paths)} files" if wrong else f"{len(paths)} files")
    return 1 if wrong else 0


def _python_files(path: Path) -> list[Path]:
    if not path.exists():
        sys.exit(f"there is no {path}")
    return [path] if path.is_file() else list(path.rglob("*.py"))


def _module(path: Path) -> str:
    """The name under which a file of the package is imported; of another file its path."""
    parts = path.resolve().with_suffix("").parts
    while PACKAGE in parts[1:]:
        parts = parts[parts.index(PACKAGE, 1) :]
    return ".".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
