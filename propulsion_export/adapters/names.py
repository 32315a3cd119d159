"""The names that an adapter may have."""

from pathlib import Path

from propulsion_export.errors import UsageError

BASE_NAME = "base"  # means the base model without an adapter; no adapter may have this name

# A file name may have 255 bytes; the rest is for `.0123456789ab.safetensors` and the like.
_LONGEST_NAME = 200


def name_of(directory: Path) -> str:
    """The name of an adapter that is given without one: the last part of its directory's path.

    A symbolic link names the adapter itself; it is not followed.
    """
    absolute = directory.absolute()
    return absolute.resolve().name if absolute.name == ".." else absolute.name


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
        UsageError: the name is reserved, or no file can have it.
    """
    if name == BASE_NAME:
        raise UsageError(
            f"an adapter cannot be called {name!r}, which means the base model without one",
            remedy="Name it: -a NAME=DIR.",
        )
    if not is_fit_name(name):
        raise UsageError(
            f"an adapter cannot be called {name!r}, because that cannot be a file name",
            remedy="Name it: -a NAME=DIR.",
        )
    return name
