"""`sparsemm check`: whether the installed vLLM is still as SPARSEMM needs it.

Without options, `differences` compares the code of vLLM with what was recorded of the release that
was tested. Nothing is started.

With `--run`, a real engine serves a small model too, and every answer is compared. Two processes
work together. `run_parent` starts the second process, watches it and prints its table.
`run_child` is the second process: `model` makes the model, `cases` says what it is asked, `engine`
serves it with vLLM, `oracle` computes the answers without vLLM, and `judge` compares the two.
What the second process finds reaches the first as lines of JSON, which `results` describes.
"""
