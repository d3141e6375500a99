"""A kernel's machine code, read: its hot loop, and cycles that one warp is expected to take.

`cuobjdump -sass` prints each instruction with its control word, in which ptxas wrote for how many
cycles the instruction after it has to wait (the stall count), and which of six scoreboards an
instruction sets or waits for. `cycles` replays one warp by these, with assumed latencies for what
ptxas cannot know: an estimate (within some 30 %) to compare variants of a kernel with, and to feed
`decode_model.py`; not a measurement. The layout of the control word is described by Jia et al.,
"Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", https://arxiv.org/abs/1804.06826.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Cycles until the result of an instruction of variable latency is there; others: 20.
LATENCY = {
    "LDS": 29,
    "LDSM": 33,
    "SHFL": 24,
    "MUFU": 22,
    "LDG": 280,  # from the L2 cache
    "LDGSTS": 20,
    "ATOMG": 700,  # to the L2 cache and back
    "BAR": 28,
    "DEPBAR": 10,
    "S2R": 30,
    "LDGDEPBAR": 10,
    "R2UR": 12,
    "P2R": 8,
}
OTHER_LATENCY = 20
TENSOR = ("HMMA", "HGMMA", "QGMMA", "IMMA")

_FIRST = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        address: byte offset in the kernel.
        text: mnemonic and operands, as `cuobjdump` prints them.
        control: control word, the upper 64 bits.
    """

    address: int
    text: str
    control: int

    @property
    def opcode(self) -> str:
        """Mnemonic without modifiers."""
        return _PREDICATE.sub("", self.text).split()[0].partition(".")[0]

    @property
    def target(self) -> int | None:
        """Address that a branch goes to; None for other instructions."""
        found = _TARGET.search(self.text) if self.opcode == "BRA" else None
        return int(found[1], 16) if found else None


Code = Sequence[Instruction]


def instructions(sass: str) -> list[Instruction]:
    """Instructions of a listing of `cuobjdump -sass`, which prints two lines for each."""
    found = []
    for line, following in pairwise([*sass.splitlines(), ""]):
        if match := _FIRST.search(line):
            control = _SECOND.search(following)
            if control is None:
                raise ValueError(f"no control word behind {line.strip()}")
            found.append(Instruction(int(match[1], 16), match[2].strip(), int(control[1], 16)))
    return found


def between(code: Code, begin: int, end: int) -> list[Instruction]:
    """Instructions at addresses from `begin` on, before `end`."""
    return [x for x in code if begin <= x.address < end]


def loops(code: Code) -> list[tuple[int, int]]:
    """First address of each loop, and the address of the branch that ends it.

    A loop is what lies between a backward branch and its target.
    """
    return [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]


def tensor_loops(code: Code) -> list[tuple[int, int]]:
    """The loops with tensor-core instructions, innermost first."""
    tensor = [x.address for x in code if x.opcode in TENSOR]
    found = [(a, b) for a, b in loops(code) if any(a <= at <= b for at in tensor)]
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def cycles(code: Code) -> int:
    """Cycles that one warp takes for these instructions, one after the other."""
    now, scoreboards = 0.0, [0.0] * 6
    for x in code:
        wait, written, read = x.control >> 52 & 63, x.control >> 46 & 7, x.control >> 49 & 7
        now = max([now, *(ready for i, ready in enumerate(scoreboards) if wait >> i & 1)])
        latency = LATENCY.get(x.opcode, OTHER_LATENCY)
        if x.opcode == "BAR":
            now += latency
        if written != 7:
            scoreboards[written] = max(scoreboards[written], now + latency)
        if read != 7:  # operands have been read, and may be overwritten
            scoreboards[read] = max(scoreboards[read], now + min(latency, 15))
        now += max(1, x.control >> 41 & 15)
    return round(now)


@dataclass(frozen=True)
class Part:
    """A piece of a kernel: instructions of a warp, and the cycles that it takes for them."""

    instructions: int
    cycles: int

    @classmethod
    def of(cls, code: Code) -> Part:
        """Count a piece."""
        return cls(len(code), cycles(code))


@dataclass(frozen=True)
class DecodeParts:
    """What `sparse_decode` does again and again.

    Attributes:
        begin: beginning an item, up to its first tile.
        tile: reading a KV tile.
        end: writing the output of an item that no other program shares.
        split: storing a part of an item that others share, and saying so.
        combine: what the last of an item's programs does besides, with one round of parts.
        round: each further round of parts.
    """

    begin: Part
    tile: Part
    end: Part
    split: Part
    combine: Part
    round: Part


def hot_loop(sass: str) -> Part | None:
    """The innermost loop with tensor-core instructions; None without one."""
    code = instructions(sass)
    found = tensor_loops(code)
    if not found:
        return None
    begin, end = found[0]
    return Part.of(between(code, begin, end + 1))


def decode_parts(sass: str) -> DecodeParts:
    """Take the machine code of `sparse_decode` apart.

    Behind the loop over tiles there is, in this order: a branch, the output of an item that no
    other program shares, and, where the branch goes, the storing of a part, an atomic addition, a
    branch to the end of the item for all but the last program, a loop over parts, the output.

    Raises:
        ValueError: if it is arranged in another way.
    """
    code = instructions(sass)
    found = tensor_loops(code)
    if len(found) < 2:
        raise ValueError("no loop over tiles inside a loop over items")
    (tile_begin, tile_end), (item_begin, item_end) = found[0], found[-1]
    rest = between(code, tile_end + 1, item_end + 1)
    atomics = [x.address for x in rest if x.opcode.startswith("ATOM")]
    inner = [loop for loop in loops(rest) if loop[0] > tile_end]
    if len(atomics) != 1 or len(inner) != 1 or inner[0][0] < atomics[0]:
        raise ValueError(f"{len(atomics)} atomic additions and {len(inner)} loops behind the tiles")
    shared = _branch(rest, tile_end, tile_end, atomics[0])
    others = _branch(rest, atomics[0], inner[0][1], item_end + 1)
    rounds = between(code, inner[0][0], inner[0][1] + 1)
    return DecodeParts(
        begin=Part.of(between(code, item_begin, tile_begin)),
        tile=Part.of(between(code, tile_begin, tile_end + 1)),
        end=Part.of(between(code, tile_end + 1, shared.target or 0)),
        split=Part.of(between(code, shared.target or 0, others.address + 1)),
        combine=Part.of(between(code, others.address + 1, item_end + 1)),
        round=Part.of(rounds),
    )


def _branch(code: Code, behind: int, low: int, high: int) -> Instruction:
    """The first branch behind an address whose target lies between two others."""
    for x in code:
        if x.address > behind and x.target is not None and low < x.target < high:
            return x
    raise ValueError(f"no branch behind {behind:#x} goes between {low:#x} and {high:#x}")
