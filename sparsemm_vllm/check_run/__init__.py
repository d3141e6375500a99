"""`sparsemm check --run`: a real engine serves a small model, and every answer is compared.

`models` makes the model, `oracle` says what its answers should be, `engine` serves it with vLLM and
`cases` says what is asked. `child` does all of this in a process of its own, and `parent` watches
that process and prints what it found.
"""
