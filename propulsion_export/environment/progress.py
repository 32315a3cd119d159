"""Report the progress of a long call to its caller."""

from collections.abc import Callable

# Called with the share done, between 0 and 1, and what is being done.
Progress = Callable[[float, str], None]


def silent(share: float, message: str) -> None:
    """Ignore the progress."""
