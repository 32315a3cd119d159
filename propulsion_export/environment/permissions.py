"""Say that there is no permission, where libraries report a missing or a damaged file."""

from pathlib import Path

from propulsion_export.errors import PropulsionExportError


def check_permission(path: Path | str, kind: type[PropulsionExportError]) -> None:
    """Check that the system lets this process read a file, or a directory and the files in it.

    It is called where reading has failed, before another cause is named. What does not exist is
    passed over.

    Raises:
        PropulsionExportError: of this kind, with the path that cannot be read.
    """
    try:
        path = Path(path).expanduser()
        for file in path.iterdir() if path.is_dir() else [path]:
            if file.is_file():  # a named pipe would wait for its writer
                file.open("rb").close()
    except PermissionError as error:
        raise kind(
            f"{error.filename or path}: no permission to read it",
            remedy="Change its permissions, or run as a user who may.",
        ) from error
    except (OSError, RuntimeError):  # it is not there, or is no file that can be opened
        return
