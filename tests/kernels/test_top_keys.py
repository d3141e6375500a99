"""The most attended key of recorded queries, against torch in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, FP8, Paged, bits

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import QueryTiles
from sparsemm_vllm.triton_kernels.tile_sizes import decode_queries, decode_rows
from sparsemm_vllm.triton_kernels.top_keys import top_keys

UNWRITTEN = -7


@dataclass
class Requests:
    """Rows with `computed` tokens before a step of `queries`, the last `recorded` of which count.

    Everything behind a row's last token is NaN, and so are null block and strange blocks.
    """

    computed: list[int]
    queries: list[int]
    recorded: list[int]
    Hkv: int = 3
    G: int = 2
    D: int = 32
    P: int = 8
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.ends = [c + q for c, q in zip(self.computed, self.queries, strict=True)]
        blocks = [-(-n // self.P) for n in self.ends]
        paged = Paged.random(blocks, 1, self.Hkv, self.P, self.D, self.cache_dtype or self.dtype)
        self.cache, self.table = paged.cache[0], paged.block_table
        poison = bits(torch.full((1,), torch.nan, device=DEVICE).to(self.cache.dtype))
        for row, n in zip(self.table, self.ends, strict=True):
            if n % self.P:
                bits(self.cache)[row[n // self.P].long(), :, n % self.P :] = poison
        generator = torch.Generator().manual_seed(sum(self.ends))
        # Strided, as a slice of a fused projection.
        fused = torch.randn(sum(self.queries), 2, self.Hkv * self.G, self.D, generator=generator)
        self.query = fused.to(self.dtype).to(DEVICE)[:, 0]

    def tiles(self, block_q: int | None = None) -> QueryTiles:
        """Output rows in reverse order of the requests, with a gap of one between them."""
        block_q = block_q or decode_queries(
            max(self.recorded), self.G, decode_rows(self.D, self.cache.dtype)
        )
        spans, first, target = [], 0, sum(self.recorded) + len(self.recorded)
        for row, (q, end, r) in enumerate(zip(self.queries, self.ends, self.recorded, strict=True)):
            first += q
            target -= r + 1
            spans.append((row, first - r, r, end - r, target))
        return QueryTiles.pack(spans, block_q, DEVICE)

    def run(self, op, tiles: QueryTiles) -> torch.Tensor:
        rows = sum(self.recorded) + len(self.recorded)
        output = torch.full((rows, self.Hkv * self.G), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        op(self.query, self.cache, self.table, tiles, output)
        return output

    def logits(self, row: int, query: int, n: int) -> torch.Tensor:
        """Of one query over `n` keys, float64 ``[Hq, n]``."""
        entry = torch.arange(n, device=DEVICE)
        keys = self.cache[self.table[row][entry // self.P].long(), :, entry % self.P, : self.D]
        keys = keys.to(self.dtype).double().repeat_interleave(self.G, 1)  # [n, Hq, D]
        return torch.einsum("hd,nhd->hn", self.query[query].double(), keys)

    def check(self, output: torch.Tensor) -> None:
        """Every recorded query's key has the largest logit; no other row is written."""
        first, target = 0, sum(self.recorded) + len(self.recorded)
        for row, (q, end, r) in enumerate(zip(self.queries, self.ends, self.recorded, strict=True)):
            first += q
            target -= r + 1
            for i in range(r):
                logits = self.logits(row, first - r + i, end - r + i + 1)
                top = output[target + i].long()[:, None]
                assert (top >= 0).all()
                assert (top < logits.shape[1]).all(), "a key of the future"
                short = logits.max(1).values - logits.gather(1, top)[:, 0]
                assert (short <= 1e-5 * logits.abs().max()).all()
            assert (output[target + r] == UNWRITTEN).all()


def compare(requests: Requests, block_q: int | None = None) -> None:
    tiles = requests.tiles(block_q)
    expected = requests.run(torch_ops.top_keys, tiles)
    actual = requests.run(top_keys, tiles)
    requests.check(expected)
    requests.check(actual)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65, 131])  # page and tile edges
def test_a_last_query_alone(n: int) -> None:
    compare(Requests([n - 1], [1], [1]))


def test_prompts_chunks_and_decodes_share_a_launch() -> None:
    """A whole prompt, the end of one, a later chunk of which nothing is recorded, a decode."""
    compare(Requests([0, 0, 40, 75], [21, 90, 10, 1], [21, 13, 0, 1]))


@pytest.mark.parametrize("G", [1, 4, 7])
@pytest.mark.parametrize("D", [16, 32, 80])  # 80: less than its tile
def test_groups_and_head_sizes(G: int, D: int) -> None:
    compare(Requests([0, 30], [70, 5], [40, 5], G=G, D=D))


@pytest.mark.parametrize("block_q", [1, 3, 8])
def test_queries_are_cut_into_tiles(block_q: int) -> None:
    compare(Requests([0, 11], [50, 9], [17, 9]), block_q)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, FP8)],
)
def test_types(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    compare(Requests([0, 64], [90, 2], [30, 2], dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("op", [top_keys, torch_ops.top_keys])
def test_ties_go_to_the_lowest_position(op) -> None:
    """Also where the equal keys lie in different tiles."""
    requests = Requests([0], [200], [3])
    requests.cache[requests.table[0, :25].long()] = 1.0
    requests.query.fill_(0.5)
    assert (requests.run(op, requests.tiles())[:3] == 0).all()
    requests.query.fill_(-0.5)
    assert (requests.run(op, requests.tiles())[:3] == 0).all()
    block, slot = requests.table[0, 150 // 8].long(), 150 % 8
    requests.cache[block, :, slot] = 0.5
    assert (requests.run(op, requests.tiles())[:3] == 150).all()


@settings(max_examples=15)
@given(data=st.data())
def test_any_requests(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    queries = [data.draw(st.integers(1, 40)) for _ in range(rows)]
    recorded = [data.draw(st.integers(0, q)) for q in queries]
    recorded[0] = max(1, recorded[0])
    computed = [data.draw(st.integers(0, 60)) for _ in range(rows)]
    sizes = {name: data.draw(st.sampled_from([1, 2, 5])) for name in ("Hkv", "G")}
    compare(Requests(computed, queries, recorded, P=data.draw(st.sampled_from([4, 16])), **sizes))


def test_contract() -> None:
    requests = Requests([0], [5], [2])
    tiles, output = requests.tiles(), torch.zeros(3, 6, dtype=torch.int32, device=DEVICE)
    query, cache, table = requests.query, requests.cache, requests.table
    with pytest.raises(ValueError, match="do not fit together"):
        top_keys(query[..., :16], cache, table, tiles, output)
    with pytest.raises(ValueError, match="must be contiguous"):
        top_keys(query.mT.contiguous().mT, cache, table, tiles, output)
    with pytest.raises(ValueError, match=r"a cache of torch.float16 beside queries"):
        top_keys(query, cache.half(), table, tiles, output)
    with pytest.raises(ValueError, match="block_table must be int32"):
        top_keys(query, cache, table.long(), tiles, output)
    with pytest.raises(ValueError, match=r"output is torch.int64 \[3, 6\]; int32"):
        top_keys(query, cache, table, tiles, output.long())
