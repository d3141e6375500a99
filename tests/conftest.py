"""Tests never reach the network, and need no GPU where there is none."""

import os

import hypothesis

from sparsemm_vllm import environment

os.environ["HF_HUB_OFFLINE"] = "1"
if not environment.has_gpu():
    environment.use_cpu()

hypothesis.settings.register_profile("shared machine", deadline=None)  # others take CPU time too
hypothesis.settings.load_profile("shared machine")
