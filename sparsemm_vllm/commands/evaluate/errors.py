"""What can go wrong with an evaluation, in one line for its user."""

from sparsemm_vllm.errors import UserError


class EvalError(UserError):
    """Questions, a folder or a configuration that cannot be evaluated; one line that says why."""
