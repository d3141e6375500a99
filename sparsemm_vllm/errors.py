"""The base of every error that a user can mend."""


class UserError(ValueError):
    """Something that a user asked for cannot be; one line says what, and what to change.

    Commands print that line and end. It is a `ValueError`, which pydantic and vLLM catch.
    """
