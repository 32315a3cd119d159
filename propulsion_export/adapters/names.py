"""What an adapter may be called."""

from propulsion_export.errors import UsageError

BASE_NAME = "base"  # the base model without an adapter; no adapter may have this name

# A file name may have 255 bytes; the rest is for `.0123456789ab.safetensors` and the like.
_LONGEST_NAME = 200


def is_fit_name(name: str) -> bool:
    """Whether an adapter may have this name: it becomes a file name and is printed on one line."""
    return (
        name != BASE_NAME
        and not name.startswith(".")
        and not set(name) & set("/\\=")
        and name.isprintable()
        and 0 < len(name.encode()) <= _LONGEST_NAME
    )


def check_name(name: str) -> str:
    """Return `name` if an adapter may have it.

    Raises:
        UsageError: it is reserved, or no file can have this name.
    """
    if name == BASE_NAME:
        raise UsageError(
            f"an adapter cannot be called {name!r}, which means the base model without one",
            remedy="Name it: -a NAME=DIR.",
        )
    if not is_fit_name(name):
        raise UsageError(
            f"an adapter cannot be called {name!r}, because the name becomes a file's",
            remedy="Name it: -a NAME=DIR.",
        )
    return name
