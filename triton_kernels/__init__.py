"""Operations on a pruned paged KV cache, one op a file: its kernels and its launcher.

`triton_ops` lists the launchers, `torch_ops` their torch twins under the same names, made of what
`reference` does to one request. What they are told:

* `batch`: the rows of a step, the head pages of the requests, the prompts to prune;
* `decode_batch`: the rows that `sparse_decode` computes, and how they are spread over the device;
* `tables`: the names of the tables' columns, for the host and for the kernels;
* `tile_sizes`: how large tiles are, and how the decode kernel is compiled.

Installed as `sparsemm_vllm.triton_kernels`. Imports torch and triton only.

Vocabulary, used in every file:

* sizes: `L` layers of the cache, `Hq` query heads, `Hkv` KV heads, `G = Hq / Hkv`, `D` head size,
  `n` prompt tokens, `W` observation window, `P` page (block) size in tokens, `Q` query tokens of a
  request in this step, `R` requests, `R'` rows of a step's batch, `N` prompt blocks, `C` compact
  blocks;
* in kernels: tiles `BLOCK_*`, pointers `x_ptr`, strides `stride_xy` (dimension `y` of `x`), flags
  `HAS_*`;
* `cache` `[L, B, Hkv, P, 2 * D]`: the paged KV cache of all layers, K before V in the last
  dimension, which is contiguous; the other strides are any multiples of ``2 * D``. A *page* is
  `cache[l, b, h]`, the `P` token slots of one head in one block;
* `row` `[max_blocks]`: a request's row of the block table,
  `[prompt blocks 0..N-1 | C compact blocks | growth blocks ...]` with `N = ceil(n / P)`;
* *head page* `i` of a request: pages of its compact blocks, striped over blocks, layers and heads:
  block `row[N + i // (L * Hkv)]`, layer `(i // Hkv) % L`, head slot `i % Hkv`.
"""
