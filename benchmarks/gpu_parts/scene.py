"""A batch with a row of every kind, on which kernels are compared with their torch twins."""

from dataclasses import replace
from typing import Any

import torch
from kernel_cases import FP8, TOLERANCE, Paged, bits, head_pages, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.device import Device
from sparsemm_vllm.triton_kernels import torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages, Prompts, PruneWorkspace, Rows
from sparsemm_vllm.triton_kernels.decode_batch import DecodeBatch, DecodeBuffers

DTYPES = {"bf16": torch.bfloat16, "fp8": FP8, "fp16": torch.float16, "fp32": torch.float32}
L, HKV = 2, 3
ROWS = 6
KERNEL_SIZE = 5


def relayout(cache: torch.Tensor, layout: str) -> torch.Tensor:
    """The same ``[L, B, Hkv, P, 2 * D]``, stored as `layout` says."""
    if layout == "LBHNC":
        return cache.contiguous()
    return cache.transpose(2, 3).contiguous().transpose(2, 3)


def tensors(pages: HeadPages) -> list[torch.Tensor]:
    """Those that are there."""
    return [tensor for tensor in vars(pages).values() if tensor is not None]


class Scene:
    """A batch with a row of every kind, in pages that are NaN where nothing may be read.

    Rows: a pruned request whose heads keep lengths at every edge of a page; one that is not
    pruned; one whose pruned prompt ends with a page and that has generated nothing yet; one whose
    prompt, to be pruned, is still computed; a long one that several programs share; a padded row.
    Rows from `real` on are padded too.
    """

    def __init__(
        self,
        device: Device,
        dtype: str,
        D: int,
        P: int,
        G: int,
        Q: int,
        layout: str,
        real: int = ROWS - 1,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.device, self.D, self.P, self.G, self.Q = device, D, P, G, Q
        self.W = W = 8 if device.dry else 32
        cache_dtype = DTYPES[dtype]
        self.dtype = torch.bfloat16 if cache_dtype == FP8 else cache_dtype
        self.tolerance = TOLERANCE[self.dtype]

        edges = torch.tensor([[0, 1, P - 1], [P, P + 1, 3 * P + 2]])
        lengths = torch.stack([edges, 0 * edges, edges.flip(0, 1), edges, 0 * edges, 0 * edges])
        n = 3 * P + 2 + W + 5 + seed
        prompts = [n, n, -(-n // P) * P, n, n, 0]
        long = (3 if device.dry else 40) * P + 13
        queries = [Q, max(1, Q - 1), Q, Q, 1, 0]
        tokens = [n + P + Q, 2 * P + 1 + Q, prompts[2] + Q, n - 3, long, 0]
        for row in range(real, ROWS):
            queries[row] = tokens[row] = 0
        pages = (-(-lengths // P)).flatten(1).sum(1)
        self.C = (-(-pages // (L * HKV))).tolist()

        order = torch.randperm(ROWS, generator=generator)  # a request's index in the pages
        by_row = head_pages(prompts, lengths, self.C, P)
        inverse = order.argsort().to(device.torch)
        self.pages = HeadPages(*(x[inverse].contiguous() for x in tensors(by_row)))
        self.lengths = lengths

        blocks = [-(-t // P) for t in tokens]
        blocks = [
            b + (C if r in (0, 2) else 0)
            for r, (b, C) in enumerate(zip(blocks, self.C, strict=True))
        ]
        paged = Paged.random(blocks, L, HKV, P, D, cache_dtype, seed)
        self.cache = relayout(paged.cache, layout)
        self.block_table = paged.block_table
        self.tables = paged.block_table.tolist()

        # The rows that are pruned, and where their blocks are.
        self.pruned = {r: prompts[r] for r in (0, 2) if r < real}
        self._poison_unused(tokens)

        start = torch.tensor([0, *queries]).cumsum(0)
        query_start = start.int().to(device.torch)
        requests = order[:real].int().to(device.torch)
        seq_lens = torch.tensor(tokens, dtype=torch.int32, device=device.torch)
        self.rows = Rows(self.block_table, query_start, seq_lens, requests)
        self.queries, self.tokens = queries, tokens
        shape = (ROWS * Q + 2, HKV * G, D)  # more than are scheduled
        self.query = torch.randn(shape, generator=generator).to(self.dtype).to(device.torch)
        scales = torch.tensor([0.7, 1.3], device=device.torch)
        self.scales = tuple(scales.split(1)) if cache_dtype == FP8 else (None, None)

        # The step that ends the prompts: the window's queries and a few before them.
        self.ends = [(W + 3) * (i + 1) for i in range(len(self.pruned))]
        shape = (self.ends[-1], HKV * G, D)
        self.window = torch.randn(shape, generator=generator).to(self.dtype).to(device.torch)
        rows = zip(self.pruned.items(), self.ends, strict=True)
        table = [(row, int(order[row]), end, n) for (row, n), end in rows]
        self.prompts = Prompts.pack(table, int(lengths.max()), device.torch)
        self.capacity = int(self.prompts.table[-1, -1]) + n + P + 16

    def _poison(self, where: torch.Tensor) -> None:
        """Make the slots ``[B, P]`` of all layers and heads NaN."""
        nan = bits(torch.tensor([torch.nan]).to(self.cache.dtype)).item()
        bits(self.cache).transpose(2, 3)[:, where.to(self.cache.device)] = nan

    def _poison_unused(self, tokens: list[int]) -> None:
        """Compact blocks, not written yet, and what follows a row's last token."""
        where = torch.zeros(self.cache.shape[1], self.P, dtype=torch.bool)
        for row, seq_len in enumerate(tokens):
            if not seq_len:
                continue
            N, C = self.compact_blocks(row)
            where[self.tables[row][N : N + C]] = True
            last, used = divmod(seq_len - 1, self.P)
            where[self.tables[row][last + C], used + 1 :] = True
        self._poison(where)

    def compact_blocks(self, row: int) -> tuple[int, int]:
        """`N` and `C` of a pruned row; nothing of the others."""
        if row not in self.pruned:
            return 0, 0
        return -(-self.pruned[row] // self.P), self.C[row]

    def workspace(self) -> PruneWorkspace:
        """Poisoned."""
        heads = HKV * self.G, HKV
        workspace = PruneWorkspace.allocate(self.capacity, *heads, self.W, self.device.torch)
        for buffer in (workspace.sums, workspace.scores, workspace.stats):
            buffer.fill_(torch.nan)
        workspace.positions.fill_(2**30)
        return workspace

    def check_prune(self) -> dict[str, float]:
        """Score, select and compact, layer by layer; then the freed blocks become NaN."""
        errors = []
        exact = self.cache.float()
        expected = self.cache.clone()
        k_scale = self.scales[0]
        for layer in range(L):
            mine, twin = self.workspace(), self.workspace()
            rest = (self.W, KERNEL_SIZE, 0.3, k_scale)
            args = self.block_table, self.prompts
            triton_ops.window_scores(self.window, self.cache[layer], *args, mine, *rest)
            torch_ops.window_scores(self.window.float(), exact[layer], *args, twin, *rest)
            written = ~twin.scores.isnan()
            assert torch.equal(~mine.scores.isnan(), written), "window_scores: columns"
            error = relative_error(mine.scores[written], twin.scores[written])
            assert error <= self.tolerance, f"window_scores: error {error:.2e}"
            errors.append(error)

            lengths = self.pages.lengths[:, layer]
            for ties in (False, True):  # of all heads' scores, then of few different ones
                if ties:
                    mine.scores.copy_((mine.scores * 1e3).round())
                mine.positions.fill_(2**30)
                twin.positions.fill_(2**30)
                twin.scores.copy_(mine.scores)
                triton_ops.select_tokens(self.prompts, mine, lengths, self.W)
                torch_ops.select_tokens(self.prompts, twin, lengths, self.W)
                assert torch.equal(mine.positions, twin.positions), f"select_tokens, ties={ties}"

            triton_ops.compact_kv(self.cache, layer, *args, mine, self.pages)
            torch_ops.compact_kv(expected, layer, *args, mine, self.pages)
            assert torch.equal(bits(self.cache), bits(expected)), "compact_kv: not the same bytes"
        freed = torch.zeros(self.cache.shape[1], self.P, dtype=torch.bool)
        for row, n in self.pruned.items():
            freed[self.tables[row][: (n - self.W) // self.P]] = True
        self._poison(freed)
        return {"window_scores": max(errors)}

    def check_slots(self) -> None:
        """Slots as vLLM computes them, corrected."""
        positions = [
            p
            for tokens, queries in zip(self.tokens, self.queries, strict=True)
            for p in range(tokens - queries, tokens)
        ]
        positions = torch.tensor(positions, device=self.device.torch)
        before = torch.arange(len(positions) + 3, device=self.device.torch) * 7
        mine, twin = before.clone(), before.clone()
        for slots, ops in ((mine, triton_ops), (twin, torch_ops)):
            ops.correct_slots(slots, positions, self.rows, self.pages, self.P, self.Q)
        assert torch.equal(mine, twin), "correct_slots"
        assert not torch.equal(mine, before), "correct_slots did nothing"

    def programs(self) -> tuple[int, int]:
        """Few, with long shares, and so many that each has a tile or two."""
        return 5, max(64, 2 * self.device.multiprocessors)

    def batch(self, programs: int, **changes: Any) -> DecodeBatch:
        """Empty buffers for the decode rows.

        Args:
            programs: programs of a launch.
            changes: fields of `DecodeOptions`, other than usual.
        """
        tiles = ROWS * max(1, self.Q * self.G)
        sizes = tiles, L, HKV, self.D, self.cache.dtype, max(self.programs())
        buffers = DecodeBuffers.allocate(*sizes, self.device.torch, self.dtype)
        buffers.partial.fill_(torch.nan)
        buffers.stats.fill_(torch.nan)
        batch = DecodeBatch.of(buffers, 0, ROWS, self.Q, self.G, programs)
        batch = replace(batch, options=replace(batch.options, **changes))
        if batch.options.lists_pages:
            batch = replace(batch, page_units=self.list_pages().page_units)
        return batch

    def list_pages(self) -> HeadPages:
        """The head pages with their places."""
        shape = ROWS, max(self.C) * L * HKV
        units = torch.zeros(shape, dtype=torch.int32, device=self.device.torch)
        pages = replace(self.pages, page_units=units)
        triton_ops.list_pages(self.cache, self.block_table, self.prompts, pages)
        return pages

    def schedule(self, ops: Any, batch: DecodeBatch) -> None:
        pages = replace(self.pages, page_units=batch.page_units)
        ops.schedule_decode(batch, pages, self.W, self.P, self.rows)

    def check_decode(self, programs: int, **changes: Any) -> float:
        """Schedule and decode every layer."""
        mine, twin = (self.batch(programs, **changes) for _ in range(2))
        self.schedule(triton_ops, mine)
        self.schedule(torch_ops, twin)
        items = twin.query_tiles * HKV
        for name, end in (("tiles", None), ("items", items), ("first_tile", items + 1)):
            a, b = getattr(mine.buffers, name), getattr(twin.buffers, name)
            a, b = (a, b) if end is None else (a[:, :end], b[:, :end])
            assert torch.equal(a, b), f"schedule_decode: {name}"
        first, expected = (batch.buffers.first_item[:, :programs] for batch in (mine, twin))
        used = first < items  # the others have nothing to do
        assert torch.equal(first[used], expected[used]), "schedule_decode: first_item"
        outputs = []
        for layer in range(L):
            output = torch.full_like(self.query, torch.nan)
            args = self.block_table, mine, output, self.D**-0.5, *self.scales
            triton_ops.sparse_decode(self.query, self.cache, layer, *args)
            outputs.append(output)
        return self.compare(outputs)

    def compare(self, outputs: list[torch.Tensor]) -> float:
        """Largest error of a layer's output; raises if it is too large."""
        batch, exact = self.batch(1), self.cache.float()
        self.schedule(torch_ops, batch)
        errors = []
        for layer, output in enumerate(outputs):
            expected = torch.full(output.shape, torch.nan, device=output.device)
            args = self.block_table, batch, expected, self.D**-0.5, *self.scales
            with sdpa_kernel(SDPBackend.MATH):
                torch_ops.sparse_decode(self.query, exact, layer, *args)
            scheduled = sum(self.queries)
            assert not output[:scheduled].isnan().any(), "sparse_decode read what it may not"
            assert output[scheduled:].isnan().all(), "sparse_decode wrote rows of nobody"
            errors.append(relative_error(output[:scheduled], expected[:scheduled]))
        assert max(errors) <= self.tolerance, f"sparse_decode: error {max(errors):.2e}"
        return max(errors)
