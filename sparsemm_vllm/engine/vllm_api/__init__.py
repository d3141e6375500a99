"""What SPARSEMM assumes of vLLM, as data, and the checks of it. Imports nothing else of ours."""
