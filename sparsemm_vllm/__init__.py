"""Serve multimodal models with per-head KV cache budgets on stock vLLM."""

from sparsemm_vllm.environment import use_cpu

__all__ = ["use_cpu"]
__version__ = "0.1.0"
