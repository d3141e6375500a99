"""The launchers of all kernels; `torch_ops` has the same names."""

from .compact_kv import compact_kv
from .correct_slots import correct_slots
from .list_pages import list_pages
from .schedule_decode import schedule_decode
from .select_tokens import select_tokens
from .sparse_decode import sparse_decode
from .top_keys import top_keys
from .window_scores import window_scores

__all__ = [
    "compact_kv",
    "correct_slots",
    "list_pages",
    "schedule_decode",
    "select_tokens",
    "sparse_decode",
    "top_keys",
    "window_scores",
]
