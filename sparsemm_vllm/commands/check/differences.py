"""`sparsemm check`: whether an installed vLLM still is as SPARSEMM assumes.

Of a release that SPARSEMM was not written for, it makes a list of what is different instead of a
traceback. Nothing of vLLM is changed, and no module of ours that needs vLLM is imported.
"""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsemm_vllm.engine.vllm_api import contract
from sparsemm_vllm.engine.vllm_api.attributes import ATTRIBUTES
from sparsemm_vllm.engine.vllm_api.compatibility import installed_version, version_problem
from sparsemm_vllm.engine.vllm_api.hooks import HOOKS


@dataclass(frozen=True)
class Finding:
    """One thing of vLLM's that SPARSEMM needs.

    Attributes:
        use: kind of use that SPARSEMM makes of it.
        symbol: name of the thing, `module:qualified.name`.
        problem: difference from what was recorded; none if there is none.
        breaks: whether SPARSEMM fails with it as it is.
    """

    use: str
    symbol: str
    problem: str | None
    breaks: bool


def check() -> list[Finding]:
    """Look for everything, in any version of vLLM; what breaks comes first."""
    known = contract.nearest(installed_version())
    different = {d.symbol: d for d in contract.compare(known, HOOKS)}
    uses = contract.uses(HOOKS)
    findings = []
    for symbol in sorted({*known.signatures, *different}):
        use = uses[symbol].kinds[0] if symbol in uses else contract.INHERITED
        if (found := different.get(symbol)) is None:
            findings.append(Finding(use, symbol, None, False))
        else:
            findings.append(Finding(found.kind, symbol, str(found), bool(found.breaks)))
    for path, names in ATTRIBUTES.items():
        for name in names.split():
            missing = _missing_attribute(path, name)
            findings.append(Finding("read", f"{path}.{name}", missing, missing is not None))
    return sorted(findings, key=lambda f: (not f.breaks, f.use == contract.INHERITED))


def _missing_attribute(path: str, name: str) -> str | None:
    """What is wrong with an attribute that instances of a class have."""
    try:
        cls = getattr(*contract.resolve(path))
        if any(_defines(base, name) for base in cls.__mro__):
            return None
        return f"{path} has no attribute {name}"
    except Exception as error:  # a module of another release may fail in any way, and is listed
        return f"{path}.{name}: {type(error).__name__}: {error}"


def _defines(cls: Any, name: str) -> bool:
    """Whether a class has the attribute, declares it, or sets it on its instances."""
    if name in vars(cls) or name in getattr(cls, "__annotations__", {}):
        return True
    if not cls.__module__.startswith("vllm"):
        return False
    return re.search(rf"\bself\.{name}\b[^=\n]*=[^=]", inspect.getsource(cls)) is not None


def print_findings(findings: list[Finding], console: Console, everything: bool = False) -> int:
    """Print what is different, or everything, as a table.

    Returns:
        The exit status: 1 if anything is different or the version is not supported.
    """
    unsupported = version_problem()
    different = [finding for finding in findings if finding.problem]
    if shown := findings if everything else different:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", "use", "finding"):
            table.add_column(column, overflow="fold")
        for finding in shown:
            table.add_row(_mark(finding), finding.use, Text(finding.problem or finding.symbol))
        console.print(table)
    console.print(_summary(findings), highlight=False)
    if unsupported is not None:
        console.print(f"{unsupported}.", highlight=False, markup=False)
    return 1 if different or unsupported else 0


def _mark(finding: Finding) -> Text:
    if finding.breaks:
        return Text("breaks", "red")
    return Text("differs", "yellow") if finding.problem else Text("ok", "green")


def _summary(findings: list[Finding]) -> str:
    installed = installed_version()
    different = [finding for finding in findings if finding.problem]
    breaking = sum(finding.breaks for finding in findings)
    text = (
        f"vLLM {installed}: {len(findings) - len(different)} of {len(findings)} symbols are as "
        f"recorded of vLLM {contract.nearest(installed).vllm}"
    )
    if different:
        text += f", {len(different)} differ, {breaking} of them break SPARSEMM"
    return f"{text}."
