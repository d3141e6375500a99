"""Strings by which processes, requests and configurations name things to each other."""

NAME = "SPARSEMM"  # the attention backend, as vLLM knows it
CUDA_BACKEND = "sparsemm_vllm.engine.attention.cuda.SparseMMBackend"
CPU_BACKEND = "sparsemm_vllm.engine.cpu.attention.SparseMMBackend"
CPU_PLATFORM = "sparsemm_vllm.engine.cpu.platform.SparseMMCpuPlatform"

KEY = "sparsemm"  # of vLLM's `additional_config`: our settings

# Keys of a request's `extra_args`. All of them begin with PREFIX.
PREFIX = "sparsemm"
PRUNE, BUDGET = "sparsemm", "sparsemm_budget"
RECORD, KNOCKOUT = "sparsemm_record", "sparsemm_knockout"
LEFT_DENSE = "sparsemm_left_dense"  # the scheduler's word to the workers; no request may say it

PRUNE_SECONDS = "sparsemm_prune_seconds"  # attribute of a worker's output
# Keys of the statistics that a step sends to the API server.
OURS, OTHERS = "sparsemm", "other"
