"""Tell a caller how far a long call has come."""

from collections.abc import Callable

# Told how far a verb has come: a share between 0 and 1, and what is being done.
Progress = Callable[[float, str], None]


def silent(share: float, message: str) -> None:
    """The progress of nobody watching."""
