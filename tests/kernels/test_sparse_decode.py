"""Decode attention against torch in float64, and that it touches nothing else."""

from dataclasses import dataclass, field, replace

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, FP8, TOLERANCE, Paged, bits, head_pages, relative_error

from sparsemm_vllm.triton_kernels import torch_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, Rows
from sparsemm_vllm.triton_kernels.cache import cache_units
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers
from sparsemm_vllm.triton_kernels.list_pages import list_pages
from sparsemm_vllm.triton_kernels.reference import head_page_slots
from sparsemm_vllm.triton_kernels.schedule_decode import schedule_decode
from sparsemm_vllm.triton_kernels.sparse_decode import sparse_decode
from sparsemm_vllm.triton_kernels.tables import TAIL
from sparsemm_vllm.triton_kernels.tile_sizes import (
    decode_options,
    decode_queries,
    decode_rows,
    query_block,
)

SCALE = 0.4  # not the default one; sharpens the softmax
L = 2


@dataclass
class Requests:
    """Rows of `prompts` tokens each and their answers so far, before a step of `query_lens`.

    Request 0 has heads that keep 0, 1, P - 1, P and P + 1 tokens and everything; odd ones are not
    pruned. Everything that no row may read is NaN: null block, strange blocks, the ends of pages,
    prompt blocks that have been freed, tokens not yet generated.
    """

    prompts: list[int]
    query_lens: list[int]
    generated: list[int]
    Hkv: int = 3
    G: int = 2
    D: int = 32
    P: int = 8
    window: int = 4
    programs: int = 6
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    padded_rows: int = 1
    block_n: int | None = 16
    lists_pages: bool = False
    pdl: bool = False
    cache: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        P, Hkv, W = self.P, self.Hkv, self.window
        generator = torch.random.manual_seed(sum(self.prompts))
        lengths = []
        for index, n in enumerate(self.prompts):
            edges = torch.tensor([0, 1, P - 1, P, P + 1, n - W]).clamp(max=n - W)
            order = torch.arange(L * Hkv) if index == 0 else torch.randint(0, 6, (L * Hkv,))
            lengths.append(edges[order % 6].reshape(L, Hkv) * (index % 2 == 0))
        self.lengths = torch.stack(lengths)
        pages = (-(-self.lengths // P)).sum((1, 2)).tolist()
        # One block more than needed: the maximum over ranks may be another's.
        self.C = [1 - -p // (L * Hkv) if i % 2 == 0 else 0 for i, p in enumerate(pages)]
        self.N = [-(-n // P) for n in self.prompts]
        self.seq_lens = [
            n + g + q for n, g, q in zip(self.prompts, self.generated, self.query_lens, strict=True)
        ]
        totals = [-(-s // P) + c for s, c in zip(self.seq_lens, self.C, strict=True)]
        cache_dtype = self.cache_dtype or self.dtype
        paged = Paged.random(totals, L, Hkv, P, self.D, cache_dtype)
        self.cache, self.block_table = paged.cache, paged.block_table
        self.pages = head_pages(self.prompts, self.lengths, self.C, P)
        self._poison()
        tokens = sum(self.query_lens) + self.padded_rows
        shape = tokens, 2, Hkv * self.G, self.D
        query = torch.randn(shape, generator=generator).to(self.dtype).to(DEVICE)
        self.query = query[:, 0]  # strided, as a slice of a fused projection
        self.output = torch.full_like(query, torch.nan)[:, 1]

    def _poison(self) -> None:
        """NaN for every slot of the rows' blocks that no query may see."""
        raw = bits(self.cache)
        poison = bits(torch.full((1,), torch.nan, device=DEVICE).to(self.cache.dtype))
        readable = torch.zeros(self.cache.shape[:4], dtype=torch.bool, device=DEVICE)
        for r, n in enumerate(self.prompts):
            row, C, N = self.block_table[r], self.C[r], self.N[r]
            start = n - self.window if C else 0
            position = torch.arange(start, self.seq_lens[r], device=DEVICE)
            entry = position // self.P
            entry = torch.where(entry < N, entry, entry + C)
            readable[:, row[entry].long(), :, position % self.P] = True
            for layer in range(L):
                for head in range(self.Hkv):
                    kept = torch.arange(int(self.lengths[r, layer, head]), device=DEVICE)
                    first = self.pages.first_pages[r, layer, head].expand_as(kept)
                    readable[head_page_slots(self.cache, row, first, kept, N)] = True
        raw[~readable] = poison

    def page_units(self) -> torch.Tensor:
        """Places of the head pages, by the kernel that writes them when a prompt is pruned."""
        rows = [(r, r, 0, n) for r, n in enumerate(self.prompts) if self.C[r]]
        most = max(self.C) * L * self.Hkv + 5
        units = torch.full((len(self.prompts), most), -(2**30), device=DEVICE).int()
        pages = replace(self.pages, page_units=units)
        list_pages(self.cache, self.block_table, Prompts.pack(rows, 0, DEVICE), pages)
        return units

    def batch(self) -> DecodeBatch:
        """The step's rows, scheduled."""
        rows = len(self.prompts) + self.padded_rows
        longest = max(self.query_lens)
        dtype = self.cache.dtype
        block_q = decode_queries(longest, self.G, decode_rows(self.D, dtype))
        tiles = rows * -(-longest // block_q)
        sizes = tiles, L, self.Hkv, self.D, dtype, self.programs + 3
        buffers = DecodeBuffers.allocate(*sizes, DEVICE, self.dtype)
        buffers.partial.fill_(torch.nan)
        buffers.stats.fill_(torch.nan)
        buffers.arrived.fill_(7)  # a new schedule sets it to zero
        options = decode_options(self.D, dtype, self.dtype, query_block(block_q * self.G))
        options = replace(options, block_n=self.block_n or options.block_n, pdl=self.pdl)
        units = self.page_units() if self.lists_pages else None
        batch = DecodeBatch.of(
            buffers, 0, rows, longest, self.G, self.programs, options, page_units=units
        )
        ends = torch.tensor([0, *self.query_lens, *[0] * self.padded_rows]).cumsum(0)
        given = Rows(
            self.block_table,
            ends.int().to(DEVICE),
            torch.tensor(self.seq_lens + [0] * self.padded_rows).int().to(DEVICE),
            torch.arange(len(self.prompts), device=DEVICE),
        )
        schedule_decode(batch, self.pages, self.window, self.P, given)
        return batch

    def check(self, k_scale: float | None = None, v_scale: float | None = None) -> None:
        """All layers equal the reference; padding and the cache are as they were."""
        scales = [
            None if x is None else torch.tensor([x], device=DEVICE) for x in (k_scale, v_scale)
        ]
        batch = self.batch()
        table = torch.cat([self.block_table, self.block_table[: self.padded_rows] * 0])
        before = bits(self.cache).clone()
        queries = sum(self.query_lens)
        for layer in range(L):
            self.output.fill_(torch.nan)
            sparse_decode(self.query, self.cache, layer, table, batch, self.output, SCALE, *scales)
            expected = torch.full_like(self.output, torch.nan, dtype=torch.float32)
            torch_ops.sparse_decode(
                self.query, self.cache, layer, table, batch, expected, SCALE, *scales
            )
            error = relative_error(self.output[:queries], expected[:queries])
            assert error < TOLERANCE[self.dtype], f"layer {layer}: {error}"
            assert self.output[queries:].isnan().all(), "padded rows are not written"
        assert torch.equal(bits(self.cache), before)


def mixed(**options: object) -> Requests:
    """Pruned, not pruned, pruned; one, three and two queries; a prime-sized prompt."""
    return Requests([61, 9, 37], [1, 3, 2], [4, 2, 20], **options)


# Page and tile sizes need not divide one another; one page a tile, two, half of one.
@pytest.mark.parametrize("P", [8, 16, 32, 64, 128])
def test_page_sizes(P: int) -> None:
    mixed(P=P).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])  # 80 and 96 are padded to 128
def test_head_sizes_and_types(D: int, dtype: torch.dtype) -> None:
    mixed(D=D, dtype=dtype, block_n=None).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [80, 128])
def test_fp8_cache(D: int, dtype: torch.dtype) -> None:
    mixed(D=D, dtype=dtype, cache_dtype=FP8).check(k_scale=0.5, v_scale=3.0)


@pytest.mark.parametrize("G", [1, 4, 7, 16])
@pytest.mark.parametrize("query_len", [1, 5, 16, 23])  # decode, drafts, the most tuned for, more
def test_packed_query_heads(G: int, query_len: int) -> None:
    Requests([61, 9], [query_len, 1], [3, 30], G=G, Hkv=2).check()


# One program does everything; items end where programs do; more programs than tiles.
@pytest.mark.parametrize("programs", [1, 2, 7, 13, 200])
def test_split_of_the_work(programs: int) -> None:
    mixed(programs=programs).check()


@pytest.mark.parametrize("n", [24, 63, 64, 65, 127])  # page edges, and a prime
@pytest.mark.parametrize("generated", [0, 1, 7, 8, 40])
def test_edges_of_the_tail(n: int, generated: int) -> None:
    """The tail begins in a prompt page, fills it and goes on in growth blocks, or does not."""
    Requests([n], [1], [generated], programs=3).check()


def test_drafts_see_themselves_and_what_came_before() -> None:
    """A later draft token's key must not change an earlier one's output."""
    requests = Requests([61], [4], [5], programs=2)
    requests.check()
    before = requests.output.clone()
    last = requests.seq_lens[0] - 1
    entry = last // requests.P + requests.C[0]
    block = int(requests.block_table[0, entry])
    requests.cache[1, block, :, last % requests.P] += 1.0
    requests.check()
    assert torch.equal(requests.output[:3], before[:3])
    assert not torch.allclose(requests.output[3], before[3])


def test_a_captured_launch_follows_the_buffers() -> None:
    """The same launch, other requests in the buffers: what a CUDA graph replays."""
    first, second = mixed(), Requests([37, 11, 61], [2, 1, 3], [1, 30, 9])
    buffers = first.batch().buffers
    table = torch.zeros(4, 40, dtype=torch.int32, device=DEVICE)
    for requests in (first, second):
        batch = requests.batch()
        for name in ("tiles", "items", "first_tile", "first_item"):
            getattr(buffers, name).copy_(getattr(batch.buffers, name))
        table.zero_()
        table[:3, : requests.block_table.shape[1]] = requests.block_table
        captured = replace(batch, buffers=buffers)
        expected = torch.full_like(requests.output, torch.nan)
        torch_ops.sparse_decode(requests.query, requests.cache, 1, table, captured, expected, SCALE)
        sparse_decode(requests.query, requests.cache, 1, table, captured, requests.output, SCALE)
        assert relative_error(requests.output[:6], expected[:6]) < 1e-5


@settings(max_examples=8)
@given(data=st.data())
def test_any_requests(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))

    def numbers(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=rows, max_size=rows))

    Requests(
        numbers(5, 90),
        numbers(1, 6),
        numbers(0, 40),
        Hkv=data.draw(st.sampled_from([1, 2, 5])),
        G=data.draw(st.sampled_from([1, 2, 7])),
        P=data.draw(st.sampled_from([4, 8, 16])),
        programs=data.draw(st.integers(1, 30)),
        padded_rows=data.draw(st.integers(0, 2)),
        block_n=data.draw(st.sampled_from([16, 32])),
    ).check()


@pytest.mark.parametrize("P", [8, 32])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 3, 2]])
def test_listed_pages(P: int, query_lens: list[int]) -> None:
    """Places of head pages, looked up instead of computed."""
    Requests([61, 9, 37], query_lens, [4, 2, 20], P=P, lists_pages=True).check()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what the interpreter lacks is replaced")
def test_dependent_launch_waits_before_it_reads_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and the newest keys come from the kernel before: they are there after the wait."""
    requests = mixed(programs=3, pdl=True)
    query, cache = requests.query.clone(), requests.cache.clone()
    requests.query.fill_(torch.nan)
    requests.cache.fill_(torch.nan)
    waits = []

    def wait() -> None:
        waits.append(1)
        requests.query.copy_(query)
        requests.cache.copy_(cache)

    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", wait)
    batch = requests.batch()
    table = torch.cat([requests.block_table, requests.block_table[:1] * 0])
    output, expected = requests.output, torch.full_like(requests.output, torch.nan).float()
    sparse_decode(requests.query, requests.cache, 1, table, batch, output, SCALE)
    assert len(waits) >= batch.programs, "every program waits"
    torch_ops.sparse_decode(query, cache, 1, table, batch, expected, SCALE)
    assert relative_error(output[:6], expected[:6]) < TOLERANCE[torch.float32]


def test_a_launch_can_be_repeated() -> None:
    """Whoever combines an item's parts leaves its counter as it was: for the next layer."""
    requests = mixed(programs=13)
    batch = requests.batch()
    arguments = requests.query, requests.cache, 1, requests.block_table, batch
    outputs = [torch.full_like(requests.output, torch.nan) for _ in range(2)]
    for output in outputs:
        sparse_decode(*arguments, output, SCALE)
        assert (batch.buffers.arrived[: batch.query_tiles * requests.Hkv] == 0).all()
    assert torch.equal(outputs[0][:6], outputs[1][:6])


def test_a_share_of_beginnings_only_reads_nothing() -> None:
    """Items of one tile between two programs: one gets the beginning, the other does the work."""
    requests = Requests([9], [1], [2], Hkv=1, programs=2, padded_rows=0)
    batch = requests.batch()
    assert batch.buffers.first_tile[:, 1].tolist() == [2, 2], "a beginning and a tile"
    arguments = requests.query, requests.cache, 0, requests.block_table, batch, requests.output
    sparse_decode(*arguments, SCALE)
    assert requests.output[:1].isfinite().all()
    assert batch.buffers.partial.isnan().all(), "nobody shares it"


def test_one_query_a_row_needs_no_causal_mask() -> None:
    """The kernel leaves it out: with a token more than a row may see, the answer must change."""
    requests = Requests([61, 9], [1, 1], [4, 2], programs=3)
    requests.check()
    before = requests.output.clone()
    batch = requests.batch()
    batch.buffers.tiles[:, TAIL] -= 1
    sparse_decode(
        requests.query, requests.cache, 1, requests.block_table, batch, requests.output, SCALE
    )
    assert not torch.allclose(requests.output[:2], before[:2])


def test_tiles_fit_the_machine() -> None:
    """Keys and values in flight: two programs share the 163 KiB of an sm_80 multiprocessor."""
    for D in (32, 64, 80, 96, 128, 256):
        for dtype in (torch.float32, torch.bfloat16, FP8):
            for block_m in (16, 32, 64):
                query = torch.bfloat16 if dtype == FP8 else dtype
                options = decode_options(D, dtype, query, block_m)
                tile = options.block_n * 2 * (1 << (D - 1).bit_length()) * dtype.itemsize
                buffers = max(1, options.stages - 3)
                assert tile * buffers <= 80 * 1024


@pytest.mark.parametrize(
    ("shape", "order", "message"),
    [
        ((2, 3, 4, 8, 64), (0, 1, 2, 4, 3), "the last 1"),  # channels before tokens
        ((2, 3, 4, 8, 65), (0, 1, 2, 3, 4), "multiple of 64"),  # cut below
    ],
)
def test_tokens_lie_at_multiples_of_their_size(
    shape: tuple[int, ...], order: tuple[int, ...], message: str
) -> None:
    cache = torch.zeros(shape, device="meta").permute(order)[..., :64]
    with pytest.raises(ValueError, match=message):
        cache_units(cache)


def test_listed_pages_fit_into_32_bits() -> None:
    with pytest.raises(ValueError, match="too many to list"):
        HeadPages.empty(1024, 1, 1, torch.device("meta"), max_pages=2**21)


def test_units_fit_into_32_bits() -> None:
    cache = torch.empty(64, 2**17 + 1, 16, 16, 64, dtype=FP8, device="meta")
    with pytest.raises(ValueError, match="32 bits"):
        cache_units(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(7, 6, 16)}, "do not fit"),
        ({"query": torch.zeros(7, 32, 6).transpose(1, 2)}, "contiguous"),
        ({"cache": torch.zeros(2, 4, 3, 8, 64, dtype=torch.float16)}, "float16"),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int64)}, "int32"),
    ],
)
def test_wrong_input(change: dict[str, torch.Tensor], message: str) -> None:
    requests = mixed()
    arguments = {
        "query": requests.query,
        "cache": requests.cache,
        "layer": 0,
        "block_table": requests.block_table,
        "batch": requests.batch(),
        "output": requests.output,
        "scale": SCALE,
    }
    with pytest.raises(ValueError, match=message):
        sparse_decode(**arguments | {name: x.to(DEVICE) for name, x in change.items()})
