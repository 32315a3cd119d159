"""The paths that a user writes."""

from pathlib import Path

from propulsion_export.errors import UsageError


def user_path(path: Path | str) -> Path:
    """A path as the user means it: `~` and `~NAME` are home directories, all else is as written.

    Raises:
        UsageError: this machine has no user of that name, or none of whom it knows the home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # what pathlib raises where there is no home directory
        name = Path(path).parts[0]
        raise UsageError(
            f"{path}: {name} is no home directory on this machine, expected a user's name after ~",
            remedy=f"Write ./{path} if a file or directory has that name.",
        ) from error
