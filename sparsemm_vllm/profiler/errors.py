"""What can go wrong with a profile run, in one line for its user."""

from sparsemm_vllm.errors import UserError


class ProfilerError(UserError):
    """A model, data or options that no profile can be made of; one line that says why."""
