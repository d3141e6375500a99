"""How fast vLLM is with SPARSEMM and without: what the benchmarks of speed share.

Runs where nothing is installed but vLLM and what it needs: no typer, rich, matplotlib or pytest.
"""
