"""The cost model counts what the schedule gives each program, and says what decides."""

import json
from dataclasses import asdict, replace
from typing import Any

import decode_model
import numpy as np
import pytest
import torch
from decode_model import (
    DEVICES,
    FIRST_TILE_CYCLES,
    MODELS,
    Costs,
    first_tiles,
    layer_tokens,
    page,
    predict,
    predict_step,
    program_cycles,
    read_costs,
)
from kernel_cases import DEVICE, head_pages
from sass import (
    DecodeParts,
    Instruction,
    Part,
    cycles,
    decode_parts,
    hot_loop,
    instructions,
    loops,
)

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import Rows
from sparsemm_vllm.triton_kernels.decode_batch import SETUP_TILES, DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.occupancy import Multiprocessor
from support.children import python
from support.paths import BENCHMARKS, ROOT

# Every part costs another power of ten: a sum tells what was counted.
PARTS = DecodeParts(*(Part(10**i, 10**i) for i in range(6)))
COSTS = Costs(PARTS, block_n=64, num_warps=4, programs_each=2)
H200 = DEVICES["h200"]


def counted(tokens: list[int], programs: int, costs: Costs = COSTS) -> list[str]:
    """Of each program how often it does what: rounds, combine, split, end, tile, begin."""
    schedule = first_tiles(np.array(tokens), costs)
    _, instructions, _ = program_cycles(schedule, programs, costs)
    return [f"{round(x):06}" for x in instructions]


def test_whole_items() -> None:
    """An item begins, reads its tiles and ends."""
    assert counted([64, 65, 0, 1], 1) == ["000343"]
    assert counted([64, 1], 2) == ["000111", "000111"]


def test_shared_items() -> None:
    """16 tiles and a beginning in programs of 6, 6 and 5: each stores a part, the last combines."""
    assert counted([1024], 3) == ["001051", "001061", "011051"]


def test_a_share_may_end_with_a_beginning() -> None:
    """The second item's own tile is read by the next program, which alone works at it."""
    assert first_tiles(np.array([128, 64, 64]), COSTS).tolist() == [0, 3, 5, 7]
    assert counted([128, 64, 64], 2) == ["000121", "000222"]


def test_further_rounds() -> None:
    """40 parts are three rounds of 16: two further ones."""
    last = counted([64 * 79], 40)[-1]
    assert last[:2] == "21"


def test_the_kernel_before_combines_in_another() -> None:
    """Nobody combines, and what it takes is added to the time."""
    before = replace(COSTS, setup_tiles=0, combine_us=1.8)
    assert not any(int(x[:2]) for x in counted([1024], 3, before))
    tokens = np.array([[1024]])
    times = [
        predict([first_tiles(tokens[0], c)], 512, 1024, c, H200).us
        for c in (before, replace(before, combine_us=0.8))
    ]
    assert times[0] - times[1] == pytest.approx(1.0, abs=0.1)


def test_the_schedule_is_the_kernels() -> None:
    """What the model is told without a schedule equals what `schedule_decode` writes."""
    generator = torch.Generator().manual_seed(0)
    L, Hkv, P, W = 2, 5, 16, 8
    lengths = torch.randint(0, 900, (3, L, Hkv), generator=generator)
    pages = head_pages([1000] * 3, lengths, [20] * 3, P)
    buffers = DecodeBuffers.allocate(3, L, Hkv, 128, torch.bfloat16, 7, DEVICE)
    batch = DecodeBatch.of(buffers, 0, 3, 1, 1)
    start = torch.arange(4, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.full((3,), 1001, dtype=torch.int32, device=DEVICE)
    rows = Rows(start.view(4, 1), start, seq_lens, start[:3])
    torch_ops.schedule_decode(batch, pages, W, P, rows)
    costs = replace(COSTS, block_n=batch.options.block_n, setup_tiles=SETUP_TILES)
    for layer in range(L):
        tokens = (lengths[:, layer] + W + 1).flatten().numpy()
        expected = buffers.first_tile[layer, : 3 * Hkv + 1].cpu().numpy()
        assert (first_tiles(tokens, costs) == expected).all()


def test_what_decides() -> None:
    """Long heads are bound by bytes, few short ones by what a program does one after the other."""
    costs = read_costs()["3.8.0"]["bf16 G=1"]
    vicuna = MODELS[0]
    dense = predict_step(vicuna, 8192, 8, None, costs, H200)
    assert dense.bound == "bytes"
    assert dense.floor_us == pytest.approx(1e6 * 8 * 32 * 8193 * 512 / H200.bandwidth)
    assert dense.floor_us < dense.us < 1.02 * dense.floor_us
    pruned = predict_step(vicuna, 8192, 1, 256, costs, H200)
    assert pruned.bound == "program"
    longest = 1e6 * (costs.parts.begin.cycles + FIRST_TILE_CYCLES) / H200.clock
    assert pruned.us > H200.launch_us + longest
    slow = replace(costs, parts=replace(costs.parts, tile=Part(10**6, 10)))
    assert predict_step(vicuna, 8192, 8, None, slow, H200).bound == "instructions"


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_the_kernel_got_faster(version: str) -> None:
    """By the model; no later version of Triton has compiled the kernel before."""
    costs = read_costs()
    for model, limit in zip(MODELS, (0.6, 0.8), strict=True):
        heads = f"bf16 G={model.G}"
        now, before = costs[version][heads], costs[f"{version} before"][heads]
        times = [predict_step(model, 8192, 32, 256, c, H200).us for c in (now, before)]
        assert times[0] < limit * times[1] + 5, (model.name, times)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0"])
def test_beginnings_are_work(version: str) -> None:
    """Weighing the beginnings of items pays where it was meant to."""
    now = read_costs()[version]["bf16 G=1"]
    saved = []
    for batch, budget in ((1, 1024), (8, 256)):
        times = [
            predict_step(MODELS[0], 8192, batch, budget, c, H200).us
            for c in (now, replace(now, setup_tiles=0))
        ]
        saved.append(1 - times[0] / times[1])
    # Triton 3.8 has made tiles and beginnings so short that bytes decide in the larger batch.
    assert saved[0] > 0.05
    assert saved[1] > (0.01 if version == "3.8.0" else 0.04)


def test_tokens_of_the_first_step() -> None:
    """The budget, the window's share in it, and the new token; all of a prompt that is short."""
    tokens = layer_tokens(MODELS[0], 8192, 2, 256)
    assert tokens.shape == (32, 64)
    assert tokens.mean() == pytest.approx(257, rel=0.02)
    assert (layer_tokens(MODELS[0], 8192, 1, None) == 8193).all()
    assert (layer_tokens(MODELS[0], 200, 1, 256) == 201).all()


@pytest.fixture(scope="module")
def predictions() -> list[dict[str, Any]]:
    """All of them, as the command prints them."""
    done = python(BENCHMARKS / "decode_model.py", "json", check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_the_table(predictions: list[dict[str, Any]]) -> None:
    assert len(predictions) == 2 * 2 * 3 * 3 * 2
    for version in ("3.6.0", "3.7.1", "3.8.0"):
        assert all(row["floor_us"] < row[version] for row in predictions)


def test_the_page_is_todays(
    predictions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else: decode_model.py markdown > benchmarks/results/decode-prediction.md."""
    monkeypatch.setattr(decode_model, "rows", lambda: predictions)
    assert (ROOT / "benchmarks" / "results" / "decode-prediction.md").read_text() == page()


SASS = """
        /*0000*/   S2R R0, SR_TID.X ;          /* 0x0000000000007919 */
                                               /* 0x000e620000002100 */
        /*0010*/   HMMA.16816.F32 R4, R8, R12, R4 ; /* 0x000000040804723c */
                                               /* 0x004fe20000001804 */
        /*0020*/   @P0 BRA 0x10 ;              /* 0xfffffff000000947 */
                                               /* 0x000fea000383ffff */
        /*0030*/   EXIT ;                      /* 0x000000000000794d */
                                               /* 0x000fea0003800000 */
"""


def test_machine_code() -> None:
    code = instructions(SASS)
    assert [x.opcode for x in code] == ["S2R", "HMMA", "BRA", "EXIT"]
    assert loops(code) == [(0x10, 0x20)]
    loop = hot_loop(SASS)
    assert loop is not None
    assert loop.instructions == 2
    assert hot_loop(SASS.replace("HMMA", "FFMA")) is None
    with pytest.raises(ValueError, match="control word"):
        instructions(SASS.splitlines()[1])


def test_cycles() -> None:
    """Stall counts add up; who waits for a scoreboard waits for the latency of what sets it."""
    stall, sets, waits = 4 << 41, 2 << 46, 1 << (52 + 2)
    free = 7 << 46 | 7 << 49
    plain = Instruction(0, "IADD3 R0, R0, R1, RZ", stall | free)
    load = Instruction(0, "LDG.E R2, [R4.64]", stall | sets | 7 << 49)
    use = Instruction(0, "IADD3 R0, R2, R1, RZ", stall | free | waits)
    assert cycles([plain] * 3) == 12
    assert cycles([load, use]) == 280 + 4
    assert cycles([load, *[plain] * 10, use]) == 280 + 4


# A decode kernel as Triton 3.6 and 3.7 lay it out: a label, then its instructions.
DECODE = """
item: IADD3; @P0 BRA meet; @P1 BRA behind
tile: HMMA; @P1 BRA tile
behind: DEPBAR; @P2 BRA shared
alone: STG; STG; BRA meet
shared: STG; @P3 BRA wait; ATOMG
wait: BAR; @P4 BRA meet
last: MOV; @P5 BRA sum
round: FADD; FMUL; LDG; @P5 BRA round
sum: STG
meet: BSYNC; @P6 EXIT; BRA item
"""
# 3.8: what is shared comes first.
SHARED_FIRST = """
item: IADD3; @P0 BRA meet; @P1 BRA behind
tile: HMMA; @P1 BRA tile
behind: DEPBAR; @!P2 BRA alone
shared: STG; @P3 BRA wait; ATOMG
wait: BAR; @P4 BRA meet
last: MOV; @P5 BRA sum
round: FADD; FMUL; LDG; @P5 BRA round
sum: BRA meet
alone: STG; STG; MOV
meet: BSYNC; @P6 EXIT; BRA item
"""
# Nobody's so far: the last program's part lies behind the others'.
LAST_BEHIND = """
item: IADD3; @P0 BRA meet; @P1 BRA behind
tile: HMMA; @P1 BRA tile
behind: DEPBAR; @P2 BRA shared
alone: STG; STG; BRA meet
last: MOV; BRA.U UP0, sum
round: FADD; FMUL; LDG; @P5 BRA round
sum: BRA meet
shared: STG; @P3 BRA wait; ATOMG
wait: BAR; @P4 BRA last
meet: BSYNC; @P6 EXIT; BRA item
"""


def listing(labelled: str) -> str:
    """A listing as `cuobjdump` prints it, each instruction with a stall of one cycle."""
    lines, labels = [], {}
    for line in labelled.split("\n")[1:-1]:
        label, _, texts = line.partition(": ")
        labels[label] = f"0x{16 * len(lines):x}"
        lines += texts.split("; ")
    found = ""
    for i, text in enumerate([*lines, "EXIT"]):
        *operation, last = text.split(" ")
        text = " ".join([*operation, labels.get(last, last)])
        found += f"/*{16 * i:04x}*/ {text} ; /* 0x{0:016x} */\n"
        found += f"/* 0x{7 << 46 | 7 << 49 | 1 << 41:016x} */\n"
    return found


@pytest.mark.parametrize("labelled", [DECODE, SHARED_FIRST, LAST_BEHIND])
def test_parts_of_the_decode_kernel(labelled: str) -> None:
    """By where control goes, in whatever order the parts lie."""
    # Some versions leave a loop by a call that never returns.
    called = labelled.replace("@P1 BRA tile", "@!P1 CALL.REL.NOINC behind; BRA tile")
    for text, tile in ((labelled, 2), (called, 3)):
        parts = decode_parts(listing(text))
        counts = {name: part["instructions"] for name, part in asdict(parts).items()}
        # The round is counted in what the last program does, and so is the end of every item.
        assert counts == {
            "begin": 3,
            "tile": tile,
            "end": 2 + 3,
            "split": 5,
            "combine": 2 + 4 + 1 + 3,
            "round": 4,
        }


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("HMMA", "FFMA", "no loop over tiles"),
        ("wait: BAR", "wait: ATOMG", "2 atomic additions and 1 loops"),
        ("@P5 BRA round", "MOV", "1 atomic additions and 0 loops"),
        ("alone: STG; STG", "alone: STG; @P5 BRA alone", "1 atomic additions and 2 loops"),
        ("HMMA", "HMMA; @P5 BRA meet", "2 ways lead out of the loop 0x30 to 0x50"),
        ("FADD", "FADD; @P4 BRA meet", "2 ways lead out of the loop"),
        ("@P4 BRA meet", "MOV", "not every item ends with"),  # every program combines
        ("@P2 BRA shared", "MOV", "0 atomic additions and 0 loops"),
        ("alone: STG", "alone: @P5 BRA wait", "not of a shared item only"),
        ("@P0 BRA meet", "@P0 BRA alone", "have code in common, or leave some out"),
        ("BRA meet\nshared", "BRA meet; NOP\nshared", "have code in common, or leave some out"),
        ("DEPBAR", "ATOMG", "2 atomic additions"),
        ("BSYNC", "RET.REL.NODEC R2 0x0", "RET.REL.NODEC R2 0x0 at 0x160 goes nobody knows where"),
        ("BSYNC", "BRX R2", "BRX R2 at 0x160 goes nobody knows where"),
        ("BSYNC", "CALL.ABS 0x0", "CALL.ABS 0x0 at 0x160 goes nobody knows where"),
    ],
)
def test_other_arrangements_are_refused(old: str, new: str, error: str) -> None:
    assert DECODE.count(old) == 1
    with pytest.raises(ValueError, match=error):
        decode_parts(listing(DECODE.replace(old, new)))


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared", "programs"),
    [
        (4, 255, 1000, 2),  # registers: 65,536 / (256 * 128)
        (4, 168, 1000, 3),
        (4, 161, 1000, 3),  # given out in multiples of 8
        (4, 32, 74240, 3),  # shared memory: 228 KiB / 73.5 KiB
        (8, 32, 1000, 8),  # threads: 2,048 / 256
        (1, 16, 0, 32),  # no more than 32 whatever they need
        (8, 255, 1000, 1),
    ],
)
def test_programs_of_a_multiprocessor(
    num_warps: int, registers: int, shared: int, programs: int
) -> None:
    hopper = Multiprocessor(65536, 228 * 1024, 2048)
    assert hopper.programs(num_warps, registers, shared) == programs
