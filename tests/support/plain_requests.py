"""A request in plain loops and float64: what a striped cache must hold and give.

Every kernel is compared with these functions, so nothing here shares code with them: keys, values
and the order of head pages are kept in ordinary arrays beside the cache.
"""

import itertools
import math

import torch

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.worker.state import Capacity, Heads, PrunedCache, SparseState
from sparsemm_vllm.triton_kernels.reference import compact_kv, select_tokens, sparse_decode

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 inside, compared with float64
D = 8
INDEX = 2  # of the request: not the first


def head_lengths(P):
    """Every edge of a page, an empty head first, in the middle and last, and a long one."""
    return (
        (0, 1, P - 1, P),
        (P + 1, 0, 7 * P + 3, 2),
        (2 * P, 3, 1, 0),
    )


def make_state(cache, layout, own):
    """A rank with room for four requests."""
    L, _, Hkv, *_ = cache.shape
    heads = Heads(L, Hkv, Hkv, D, cache.dtype)
    state = SparseState(layout, own, heads, Capacity(4, 1, 1), torch.device("cpu"))
    state.attach(PrunedCache(cache, {}))
    return state


class Scene:
    """A request with a pruned prompt: its tokens in plain tensors, and a cache that holds them.

    `kv` `[L, Hkv, T, 2 * D]` is what the cache should hold; block 0 is vLLM's null block.
    """

    def __init__(self, lengths, n, W, P, generated, seed=0, order="lbnhc", dtype=torch.float32):
        torch.manual_seed(seed)
        self.n, self.W, self.P, self.seq_len = n, W, P, n + generated
        self.layout = CacheLayout(lengths, window=W, base=1)
        assert self.layout.is_pruned(n)
        L, Hkv = len(lengths), len(lengths[0])
        self.L, self.Hkv = L, Hkv
        self.N, self.C = -(-n // P), self.layout.compact_blocks(n, P)
        used = -(-self.seq_len // P) + self.C
        B = used + 5
        shape = {"L": L, "B": B, "H": Hkv, "N": P, "C": 2 * D}
        physical = torch.empty([shape[a] for a in order.upper()], dtype=dtype)
        physical.fill_(torch.nan)
        self.cache = physical.permute(*[order.upper().index(a) for a in "LBHNC"])
        ids = 1 + torch.randperm(B - 1)
        self.row = torch.cat([ids[:used], torch.zeros(6, dtype=torch.long)]).int()
        self.kv = torch.randn(L, Hkv, self.seq_len, 2 * D).to(dtype)
        self.state = make_state(self.cache, self.layout, self.layout.slice_of(0, 0))
        for index in range(4):  # neighbours and an earlier owner of the index must not matter
            self.state.add(index, 4 * n)
        self.state.add(INDEX, n)
        self.positions = []  # kept positions by layer and head
        for token in range(n):
            self.write(token, entry=token // P)

    def write(self, token, entry):
        self.cache[:, self.row[entry], :, token % self.P] = self.kv[:, :, token]

    def arguments(self, layer):
        return {"lengths": self.lengths(layer), "first_pages": self.first(layer)}

    def lengths(self, layer):
        return self.state.pages.lengths[INDEX, layer]

    def first(self, layer):
        return self.state.pages.first_pages[INDEX, layer]

    def prune(self):
        """Select at random, compact layer by layer, hand the freed blocks to others."""
        for layer in range(self.L):
            scores = torch.rand(self.Hkv, self.n - self.W)
            capacities = torch.tensor(self.layout.capacities[layer])
            width = int(self.lengths(layer).max())
            selected = select_tokens(scores, capacities, width)
            compact_kv(
                self.cache,
                layer,
                self.row,
                selected,
                total=int(self.lengths(layer).sum()),
                prompt_blocks=self.N,
                **self.arguments(layer),
            )
            lengths = capacities.clamp(max=self.n - self.W).tolist()
            self.positions.append([selected[h, :length] for h, length in enumerate(lengths)])

    def decode(self):
        """Blocks of older prompt tokens are gone; generated tokens lie behind the compact ones."""
        self.cache[:, self.row[: (self.n - self.W) // self.P].long()] = torch.nan
        for token in range(self.n, self.seq_len):
            entry = token // self.P
            self.write(token, entry if entry < self.N else entry + self.C)

    def attend(self, query, layer, **bounds):
        options = {
            "longest": int(self.lengths(layer).max()),
            "max_seq_len": self.seq_len,
        } | bounds
        return sparse_decode(
            query,
            self.cache,
            layer,
            self.row,
            tail_start=self.n - self.W,
            prompt_blocks=self.N,
            compact_blocks=self.C,
            seq_len=torch.tensor(self.seq_len),
            scale=D**-0.5,
            **options,
            **self.arguments(layer),
        )

    def expected(self, query, layer):
        """Plain softmax over the kept tokens and the tail, per query and head."""
        Q, Hq, _ = query.shape
        out = torch.empty(Q, Hq, D, dtype=torch.float64)
        for i, hq in itertools.product(range(Q), range(Hq)):
            head = hq // (Hq // self.Hkv)
            tail = torch.arange(self.n - self.W, self.seq_len - Q + i + 1)
            seen = torch.cat([self.positions[layer][head], tail])
            out[i, hq] = plain_attention(query[i, hq], self.kv[layer, head, seen])
        return out.to(query.dtype)


def plain_attention(query, kv):
    key, value = kv.double().split(D, -1)
    return (key @ query.double() / math.sqrt(D)).softmax(0) @ value


def page_slots(scene):
    """Layer, block, head slot and token slot of every kept token, by counting pages."""
    pages = (
        (block, layer, slot)
        for block in scene.row[scene.N : scene.N + scene.C].tolist()
        for layer in range(scene.L)
        for slot in range(scene.Hkv)
    )
    for layer, heads in enumerate(scene.positions):
        for head, positions in enumerate(heads):
            for rank, position in enumerate(positions.tolist()):
                if rank % scene.P == 0:
                    page_block, page_layer, page_head = next(pages)
                yield (page_layer, page_block, page_head, rank % scene.P), (layer, head, position)


def as_integers(tensor):
    """Bytes, so that NaN equals itself."""
    tensor = tensor.contiguous()
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).clone()
