"""`sparsemm look`: what visual heads look at while a model answers, and what the cache kept."""
