import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, FP8, Paged, bits, head_pages

from sparsemm_vllm.triton_kernels import reference, torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace
from sparsemm_vllm.triton_kernels.compact_kv import compact_kv, tiles
from sparsemm_vllm.triton_kernels.select_tokens import select_tokens

W = 4
FILLER = 777  # of columns and requests that nobody may use


def edges(P):
    """Lengths ``[L, Hkv]`` at every edge of a page; an empty head first, inside and last."""
    return [[0, 1, P - 1], [P, P + 1, 0], [3 * P + 2, 2, 0]]


class Scene:
    """Prompts between other requests: index `2 * i + 1` of the pages, row `i + 1` of the table."""

    def __init__(self, lengths, tokens, P, D, dtype=torch.float32, seed=0):
        self.P, self.tokens = P, tokens
        lengths = torch.tensor(lengths)  # [R, L, Hkv]
        self.R, self.L, self.Hkv = lengths.shape
        self.N = [-(-n // P) for n in tokens]
        pages = (-(-lengths // P)).flatten(1).sum(1)
        self.C = (-(-pages // (self.L * self.Hkv))).tolist()
        owned = [2, *(N + C for N, C in zip(self.N, self.C, strict=True))]
        self.paged = Paged.random(owned, self.L, self.Hkv, P, D, dtype, seed)
        own = head_pages(tokens, lengths, self.C, P)
        tensors = own.prompt_tokens, own.compact_blocks, own.lengths, own.first_pages
        spread = [torch.full_like(x.repeat_interleave(2, 0), FILLER) for x in tensors]
        for wide, values in zip(spread, tensors, strict=True):
            wide[1::2] = values
        self.pages = HeadPages(*spread)
        rows = [(i + 1, 2 * i + 1, 0, n) for i, n in enumerate(tokens)]
        self.prompts = Prompts.pack(rows, int(lengths.max()), DEVICE)
        capacity = int(self.prompts.table[-1, -1]) + tokens[-1]
        self.workspace = PruneWorkspace.allocate(capacity, self.Hkv, self.Hkv, W, DEVICE)
        self.workspace.positions.fill_(2**30)
        generator = torch.Generator().manual_seed(seed)
        self.kept = {}  # positions by prompt, layer and head
        for i, n in enumerate(tokens):
            for layer in range(self.L):
                for head in range(self.Hkv):
                    order = torch.randperm(n - W, generator=generator)
                    kept = order[: lengths[i, layer, head]].sort().values
                    self.kept[i, layer, head] = kept.to(DEVICE)

    def enter(self, layer):
        """Positions of one layer; nothing behind them is a position."""
        self.workspace.positions.fill_(2**30)
        offsets = self.prompts.table[-1].tolist()
        for (i, own, head), kept in self.kept.items():
            if own == layer:
                start = offsets[i]
                self.workspace.positions[head, start : start + len(kept)] = kept.int()

    def prune(self, op):
        """A copy of the cache in which `op` has compacted every layer."""
        cache = self.paged.cache.clone()  # keeps the strides
        assert cache.stride() == self.paged.cache.stride()
        for layer in range(self.L):
            self.enter(layer)
            args = (self.paged.block_table, self.prompts, self.workspace, self.pages)
            op(cache, layer, *args)
        return cache

    def expected(self):
        """Token by token, in Python."""
        cache = bits(self.paged.cache).clone()
        source = bits(self.paged.cache)
        rows = self.paged.block_table.tolist()
        for (i, layer, head), kept in self.kept.items():
            row, P = rows[i + 1], self.P
            page = int(self.pages.first_pages[2 * i + 1, layer, head])
            for t, position in enumerate(kept.tolist()):
                block, stripe = divmod(page + t // P, self.L * self.Hkv)
                to = stripe // self.Hkv, row[self.N[i] + block], stripe % self.Hkv, t % P
                cache[to] = source[layer, row[position // P], head, position % P]
        return cache

    def check(self):
        """All bytes of the cache: what was to be copied and what was to stay."""
        expected = self.expected()
        assert not torch.equal(expected, bits(self.paged.cache))
        assert torch.equal(bits(self.prune(compact_kv)), expected)
        assert torch.equal(bits(self.prune(torch_ops.compact_kv)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8])
@pytest.mark.parametrize(
    ("P", "D"),
    [
        (16, 32),  # the smallest of both that vLLM uses
        (8, 80),  # 2 * D is no power of two; another page size
        (32, 96),
    ],
)
def test_bytes_are_copied(P, D, dtype):
    Scene([edges(P)], [5 * P + 3], P, D, dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_any_bytes_are_copied(dtype):
    """NaN payloads, signalling ones too, infinities and denormals."""
    scene = Scene([edges(8)], [61], P=8, D=32, dtype=dtype)
    raw = bits(scene.paged.cache)
    generator = torch.Generator().manual_seed(1)
    limits = torch.iinfo(raw.dtype)
    anything = torch.randint(limits.min, limits.max + 1, raw.shape, generator=generator)
    if dtype == torch.float32:
        anything[..., ::2] |= 0x7F800001  # NaN, quiet or not as chance has it
    raw.copy_(anything)
    assert scene.paged.cache.float().isnan().any()
    scene.check()


def test_prompts_share_a_launch():
    """Unequal prompts and lengths; one keeps nothing at all; n prime, on and next to a page."""
    P = 8
    nothing = [[0, 0, 0]] * 3
    scene = Scene([edges(P), nothing, edges(P)[::-1]], [61, 4 * P, 4 * P + 1], P, D=16)
    scene.check()


@pytest.mark.parametrize("D", [64, 128, 256])
def test_large_heads(D):
    """More tokens than a tile, one head of many: compact blocks of several stripes."""
    block_t = tiles(D, 4)["BLOCK_T"]
    lengths = [[2 * block_t + 1, 0], [block_t - 1, block_t]]
    Scene([lengths], [2 * block_t + 30], P=4, D=D).check()


@pytest.mark.parametrize("Hkv", [1, 7])  # one KV head; an odd number of heads
def test_head_counts(Hkv):
    lengths = [[(3 * h + layer) % 20 for h in range(Hkv)] for layer in range(4)]
    Scene([lengths], [47], P=16, D=8).check()


@settings(max_examples=15)
@given(data=st.data())
def test_any_lengths(data):
    P = data.draw(st.sampled_from([3, 8, 16]))
    L, Hkv = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    tokens = data.draw(st.lists(st.integers(W + 1, 50), min_size=1, max_size=2))
    lengths = [
        [[data.draw(st.integers(0, n - W)) for _ in range(Hkv)] for _ in range(L)] for n in tokens
    ]
    lengths[0][0][0] = max(1, lengths[0][0][0])  # something to do
    D = data.draw(st.sampled_from([4, 10, 32]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, FP8]))
    Scene(lengths, tokens, P, D, dtype, seed=data.draw(st.integers(0, 9))).check()


@pytest.mark.parametrize("G", [1, 4, 7])
def test_a_whole_prune(G):
    """Scores, selection and copy of every layer; then attention finds what the reference keeps."""
    P, D, n = 8, 16, 67
    scene = Scene([edges(P)], [n], P, D)
    row = scene.paged.block_table[1]
    query = torch.randn(n, 3 * G, D, generator=torch.Generator().manual_seed(G)).to(DEVICE)
    prompts = Prompts.pack([(1, 1, n, n)], scene.prompts.max_kept, DEVICE)
    workspace = PruneWorkspace.allocate(n, 3 * G, 3, W, DEVICE)
    cache = scene.paged.cache.clone()
    positions = torch.arange(n, device=DEVICE)
    for layer in range(scene.L):
        kv = reference.read_tokens(scene.paged.cache[layer], row, positions, scene.N[0], 0)
        scores = reference.window_scores(query[n - W :].transpose(0, 1), kv[..., :D], 5, D**-0.5)
        lengths = scene.pages.lengths[1, layer]
        for head, kept in enumerate(reference.kept_tokens(scores, lengths)):
            scene.kept[0, layer, head] = kept

        args = (scene.paged.block_table, prompts, workspace)
        torch_ops.window_scores(query, cache[layer], *args, W, 5, D**-0.5)
        select_tokens(prompts, workspace, scene.pages.lengths[:, layer], W)
        compact_kv(cache, layer, *args, scene.pages)
    assert torch.equal(bits(cache), scene.expected())


def test_tiles():
    assert tiles(128, 2) == {"BLOCK_T": 32, "BLOCK_D": 256, "num_warps": 4}
    assert tiles(80, 2) == tiles(128, 2), "padded"
    assert tiles(8, 1)["BLOCK_T"] == 128
    assert tiles(8192, 4)["BLOCK_T"] == 1


def test_contract():
    scene = Scene([edges(8)], [61], P=8, D=32)
    cache, table = scene.paged.cache, scene.paged.block_table
    rest = scene.prompts, scene.workspace, scene.pages
    with pytest.raises(ValueError, match=r"cache is torch.float64 \[3, "):
        compact_kv(cache.double(), 0, table, *rest)
    with pytest.raises(ValueError, match="contiguous last dimension wanted"):
        compact_kv(cache[..., ::2], 0, table, *rest)
    with pytest.raises(ValueError, match="layer is 3; the cache has 3"):
        compact_kv(cache, 3, table, *rest)
    with pytest.raises(ValueError, match="layer is -1"):
        compact_kv(cache, -1, table, *rest)
    with pytest.raises(ValueError, match=r"block_table is torch.int64"):
        compact_kv(cache, 0, table.long(), *rest)
    with pytest.raises(ValueError, match="with contiguous rows wanted"):
        compact_kv(cache, 0, table[:, ::2], *rest)
    with pytest.raises(ValueError, match=r"positions are torch.int32 \[3, \d+\]"):
        compact_kv(cache[:, :, :2], 0, table, *rest)
    with pytest.raises(ValueError, match=r"lengths are torch.int32 \[2, 3, 3\]"):
        compact_kv(cache[:2], 0, table, *rest)
    pages = scene.pages
    wrong = HeadPages(
        pages.prompt_tokens, pages.compact_blocks, pages.lengths, pages.first_pages.long()
    )
    with pytest.raises(ValueError, match=r"first_pages are torch.int64"):
        compact_kv(cache, 0, table, *rest[:2], wrong)
