"""Benchmarks under pytest: where there is no GPU, vLLM runs on the CPU."""

from sparsemm_vllm import environment

if not environment.has_gpu():
    environment.use_cpu()  # before a benchmark imports Triton
