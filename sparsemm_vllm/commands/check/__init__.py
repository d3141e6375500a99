"""`sparsemm check --run`: a real engine serves a small model, and every answer is compared.

`model` makes the model, `cases` says what it is asked, `engine` serves it with vLLM, `oracle`
computes its answers without vLLM, and `judge` compares. `child` does all of this in a process of
its own. `parent` watches that process and prints its `results`.
"""
