"""What can go wrong with an evaluation, in one line for its user."""


class EvalError(ValueError):
    """Questions, a folder or a configuration that cannot be evaluated; one line that says why."""
