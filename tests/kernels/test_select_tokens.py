import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import Prompts, PruneWorkspace, columns
from sparsemm_vllm.triton_kernels.select_tokens import select_tokens, tiles
from support.golden import LAYERS, PRUNED, Case, differs_by_ties_only

W = 3
UNWRITTEN = -7
FLOAT32_BITS = st.integers(0, 2**32 - 1).map(
    lambda bits: float(np.array([bits], np.uint32).view(np.float32)[0])
)


def workspace_of(scores):
    """Scores ``[Hkv, m]`` of each prompt in their columns; NaN above and below all in others."""
    rows = [(0, i, 0, head.shape[1] + W) for i, head in enumerate(scores)]
    prompts = Prompts.pack(rows, 0, DEVICE)
    Hkv = scores[0].shape[0]
    capacity = sum(columns(row[3]) for row in rows) + 16
    workspace = PruneWorkspace.allocate(capacity, Hkv, Hkv, W, DEVICE)
    workspace.scores.fill_(torch.nan)
    workspace.scores.view(torch.int32)[:, ::2] = -1  # a NaN of negative sign: the lowest key
    for offset, prompt in zip(prompts.table[-1].tolist(), scores, strict=True):
        workspace.scores[:, offset : offset + prompt.shape[1]] = prompt
    return prompts, workspace


def select(op, prompts, workspace, lengths):
    """All of the buffer, so that what must not be written is compared too."""
    workspace.positions.fill_(UNWRITTEN)
    before = workspace.scores.clone()
    op(prompts, workspace, lengths, W)
    assert torch.equal(workspace.scores.view(torch.int32), before.view(torch.int32))
    return workspace.positions.clone()


def check(scores, lengths):
    """Kernel against twin; `lengths` ``[R, Hkv]``."""
    prompts, workspace = workspace_of(scores)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    expected = select(torch_ops.select_tokens, prompts, workspace, lengths)
    assert torch.equal(select(select_tokens, prompts, workspace, lengths), expected)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "m",
    [
        1,  # one score
        15,  # one short of an aligned load
        16,
        17,
        1009,  # prime, in the smallest tile
        4095,  # the largest single tile: one short, full, and two tiles
        4096,
        4097,
        3 * 4096 + 13,  # many tiles, the last nearly empty
    ],
)
def test_edge_sizes(m):
    lengths = [0, 1, m - 1, m, m + 1, m // 2, 100000]
    check([random(len(lengths), m)], [lengths])


def test_prompts_of_many_lengths_share_a_launch():
    sizes = [5, 4200, 33, 1, 0, 700]  # the fifth has no token but its window
    lengths = [[min(k, m) for k in (m // 3, 0, 7)] for m in sizes]
    check([random(3, m, seed=m) for m in sizes], lengths)


def test_lengths_are_a_strided_view_of_requests():
    """One layer of ``[max_requests, L, Hkv]``, transposed; requests in no order."""
    Hkv = 4
    storage = torch.full((Hkv, 5, 3), 10**6, dtype=torch.int32, device=DEVICE)
    lengths = storage[:, :, 1].T
    lengths[3] = torch.tensor([0, 16, 17, 40])
    lengths[1] = torch.tensor([50, 1, 15, 0])
    rows = [(0, 3, 0, 40 + W), (1, 1, 0, 50 + W)]
    prompts = Prompts.pack(rows, 0, DEVICE)
    workspace = PruneWorkspace.allocate(200, Hkv, Hkv, W, DEVICE)
    workspace.scores.copy_(random(*workspace.scores.shape))
    expected = select(torch_ops.select_tokens, prompts, workspace, lengths)
    assert torch.equal(select(select_tokens, prompts, workspace, lengths), expected)


@pytest.mark.parametrize("m", [4096, 9000])  # one tile; three, with ties in each
@pytest.mark.parametrize(
    "values",
    [
        [0.25],  # all equal: the first k
        [-3.5],
        [0.0, -0.0],  # equal too
        [0.0, 1.0],
        [-1.0, -0.0, 0.0, 1.0, 1.0000001],
        # Neighbours that differ in each byte of their bits.
        [1.0, 1.0 + 2**-23, 1.0 + 2**-15, 1.0 + 2**-7, 2.0],
        [3.4e38, -3.4e38, 1e-45, -1e-45, 1e-38],  # largest, denormal
    ],
)
def test_ties_go_to_the_lowest_index(m, values):
    choice = torch.randint(len(values), (7, m), generator=torch.Generator().manual_seed(m))
    lengths = [1, m // 2, m - 1, m // 5, m // 3, 17, 4095]
    check([torch.tensor(values)[choice]], [lengths])


def test_keys_order_floats_of_every_sign_and_size():
    """Ascending scores: the k best are the last, so that no two are swapped."""
    bits = torch.randint(0, 2**31 - 2**23, (1500,), generator=torch.Generator().manual_seed(0))
    positive = bits.unique().int().view(torch.float32)
    scores = torch.cat([-positive.flip(0), positive])
    m = len(scores)
    prompts, workspace = workspace_of([scores.expand(5, m)])
    lengths = [1, 100, len(positive), len(positive) + 1, m - 1]
    kept = select(
        select_tokens,
        prompts,
        workspace,
        torch.tensor([lengths], dtype=torch.int32, device=DEVICE),
    )
    for row, k in zip(kept.tolist(), lengths, strict=True):
        assert row == [*range(m - k, m)] + [UNWRITTEN] * (len(row) - k)


@settings(max_examples=25)
@given(data=st.data())
def test_any_scores(data):
    Hkv = data.draw(st.integers(1, 3))
    finite = FLOAT32_BITS.filter(np.isfinite)
    few = st.sampled_from([0.0, -0.0, 0.5, -0.5])
    scores, lengths = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        m = data.draw(st.integers(1, 40))
        values = st.one_of(finite, few)
        rows = st.lists(values, min_size=m, max_size=m)
        scores.append(torch.tensor([data.draw(rows) for _ in range(Hkv)]))
        lengths.append([data.draw(st.integers(0, m)) for _ in range(Hkv)])
    check(scores, lengths)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("number", PRUNED)
def test_golden_kept_sets(number, layer):
    """The published implementation's, of the twin's scores."""
    case = Case(number)
    scores = case.scores()
    m = scores.shape[1]
    capacities = torch.tensor([case.layout().capacities[layer]], dtype=torch.int32)
    _, workspace = workspace_of([scores])
    prompts = Prompts.pack([(0, 0, 0, case.n)], 0, DEVICE)
    workspace.positions.fill_(UNWRITTEN)
    select_tokens(prompts, workspace, capacities.to(DEVICE), case.window)
    window = set(range(m, case.n))
    for head, published in enumerate(case.kept(layer)):
        row = workspace.positions[head].cpu()
        mine = row[row != UNWRITTEN].tolist()
        assert mine == sorted(set(mine))
        assert len(mine) == min(m, capacities[0, head])
        assert differs_by_ties_only(set(mine) | window, published, scores[head]), f"head {head}"


def test_tiles():
    assert tiles(0) == tiles(1024) == {"BLOCK": 1024, "ONE_TILE": True, "num_warps": 8}
    assert tiles(4096) == {"BLOCK": 4096, "ONE_TILE": True, "num_warps": 8}
    assert tiles(4097) == tiles(10**6) == {"BLOCK": 4096, "ONE_TILE": False, "num_warps": 8}


def test_contract():
    prompts, workspace = workspace_of([random(2, 9)])
    lengths = torch.ones(1, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"lengths are torch.int64 \[1, 2\]"):
        select_tokens(prompts, workspace, lengths.long(), W)
    with pytest.raises(ValueError, match=r"lengths are torch.int32 \[1, 1\]"):
        select_tokens(prompts, workspace, lengths[:, :1], W)
    double = PruneWorkspace(
        workspace.sums, workspace.scores.double(), workspace.positions, workspace.stats
    )
    with pytest.raises(ValueError, match=r"scores are torch.float64"):
        select_tokens(prompts, double, lengths, W)
    strided = PruneWorkspace(
        workspace.sums, workspace.scores, workspace.positions[:, ::2], workspace.stats
    )
    with pytest.raises(ValueError, match=r"positions are torch.int32, stride \(\d+, 2\)"):
        select_tokens(prompts, strided, lengths, W)
