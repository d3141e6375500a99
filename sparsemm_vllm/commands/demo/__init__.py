"""`sparsemm demo`: the bundled model reads a new picture from a pruned KV cache."""
