from sparsemm_vllm.data.load import load_samples
from sparsemm_vllm.data.samples import DataError, SampleSet

__all__ = ["DataError", "SampleSet", "load_samples"]
