"""A kernel's machine code, read: its hot loop, and cycles that one warp is expected to take.

`cuobjdump -sass` prints each instruction with its control word, in which ptxas wrote for how many
cycles the instruction after it has to wait (the stall count), and which of six scoreboards an
instruction sets or waits for. `cycles` replays one warp by these, with assumed latencies for what
ptxas cannot know: an estimate (within some 30 %) to compare variants of a kernel with, and to feed
`decode_model.py`; not a measurement. The layout of the control word is described by Jia et al.,
"Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", https://arxiv.org/abs/1804.06826.
"""

import re
from collections.abc import Container, Sequence
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

JUMPS = ("BRA", "CALL", "RET", "BRX", "BRXU", "JMP", "JMX", "JMXU")
# A call without a return address is a branch, as long as nothing returns: RET is refused.
_JUMP = re.compile(r"\b(?:BRA|CALL\.REL\.NOINC)\b.* 0x([0-9a-f]+)$")
ALWAYS = ("BRA", "CALL.REL.NOINC", "EXIT")  # without a condition


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
    def mnemonic(self) -> str:
        """Mnemonic with its modifiers, ``LDG.E.128``."""
        return _PREDICATE.sub("", self.text).split()[0]

    @property
    def opcode(self) -> str:
        """Mnemonic without modifiers."""
        return self.mnemonic.partition(".")[0]

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
    def of(cls, code: Code) -> "Part":
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
        combine: work that the last of an item's programs does besides, with one round of parts.
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


# Where control goes after each instruction.
Flow = dict[int, tuple[int, ...]]


def flow(code: Code) -> Flow:
    """Addresses of the instructions that may come after each one.

    Raises:
        ValueError: for a jump whose targets the listing does not tell.
    """
    ways: Flow = {}
    for x, following in zip(code, [*code[1:], None], strict=True):
        after = () if following is None or x.text in ALWAYS else (following.address,)
        if x.opcode in JUMPS:
            target = _JUMP.search(x.text)
            if target is None:
                raise ValueError(f"{x.text} at {x.address:#x} goes nobody knows where")
            always = x.text.split(" 0x")[0] in ALWAYS
            after = (*(() if always else after), int(target[1], 16))
        ways[x.address] = after
    return ways


def reached(ways: Flow, begin: int, stop: Container[int] = ()) -> set[int]:
    """Addresses on all ways from `begin` on, up to those in `stop`, which do not belong to it."""
    found: set[int] = set()
    ahead = [begin]
    while ahead:
        at = ahead.pop()
        if at not in found and at not in stop:
            found.add(at)
            ahead.extend(ways[at])
    return found


def decode_parts(sass: str) -> DecodeParts:
    """Take the machine code of `sparse_decode` apart, by where control goes.

    Behind the loop over tiles the ways part. One leads to the output of an item that no other
    program shares. The other one leads to storing a part, an atomic addition, and a fork: all
    programs but the last leave, the last one goes through a loop over parts to the output. All meet
    at the end of the loop over items. In which order this lies in memory is another matter: Triton
    3.6 and 3.7 put the unshared output first, 3.8 puts it last.

    Raises:
        ValueError: if control goes another way.
    """
    code = instructions(sass)
    found = tensor_loops(code)
    if len(found) < 2:
        raise ValueError("no loop over tiles inside a loop over items")
    (tile_begin, tile_end), (item_begin, item_end) = found[0], found[-1]
    ways = flow(code) | {item_end: ()}  # one turn of the loop over items
    behind = _behind(code, ways, tile_begin, tile_end)
    rest = reached(ways, behind)
    atomics = [x.address for x in code if x.address in rest and x.opcode.startswith("ATOM")]
    backward = [loop for loop in loops(code) if rest.issuperset(loop)]
    inner = [loop for loop in backward if loop[1] in reached(ways, loop[0])]
    if len(atomics) != 1 or len(inner) != 1:
        raise ValueError(f"{len(atomics)} atomic additions and {len(inner)} loops behind the tiles")
    ((round_begin, round_end),) = inner
    shared, alone = _fork(ways, behind, round_begin)
    last, others = _fork(ways, atomics[0], round_begin)
    meet = reached(ways, others)  # the end of every item
    if not meet <= reached(ways, alone):
        raise ValueError(f"not every item ends with what lies at {others:#x}")
    pieces = {
        "begin": reached(ways, item_begin, {tile_begin, behind, *meet}),
        "tile": reached(ways, tile_begin, {behind}),
        "end": reached(ways, behind, {shared, *meet}),
        "split": reached(ways, shared, {last, *meet}),
        "combine": reached(ways, last),
    }
    whole = [x.address for x in between(code, item_begin, item_end + 1)]
    if sorted(at for piece in pieces.values() for at in piece) != whole:
        raise ValueError("the parts of an item have code in common, or leave some out")
    if atomics[0] not in pieces["split"]:
        raise ValueError(f"the atomic addition at {atomics[0]:#x} is not of a shared item only")
    after_rounds = _behind(code, ways, round_begin, round_end)
    pieces["round"] = reached(ways, round_begin, {after_rounds})
    return DecodeParts(
        **{name: Part.of([x for x in code if x.address in at]) for name, at in pieces.items()}
    )


def _behind(code: Code, ways: Flow, begin: int, end: int) -> int:
    """Where control goes from a loop."""
    loop = {x.address for x in between(code, begin, end + 1)}
    behind = {after for at in loop for after in ways[at]} - loop
    if len(behind) != 1:
        raise ValueError(f"{len(behind)} ways lead out of the loop {begin:#x} to {end:#x}")
    return behind.pop()


def _fork(ways: Flow, begin: int, goal: int) -> tuple[int, int]:
    """The first fork from `begin` on of which only one way leads to `goal`: this way, the other."""
    forks = {}
    for at in reached(ways, begin):
        leading = [goal in reached(ways, after) for after in ways[at]]
        if sorted(leading) == [False, True]:
            forks[at] = ways[at][leading.index(True)], ways[at][leading.index(False)]
    first = [at for at in forks if forks.keys() <= reached(ways, at)]
    if len(first) != 1:
        raise ValueError(f"{len(first)} forks behind {begin:#x} on the way to {goal:#x}")
    return forks[first[0]]
