"""Read the rows of whatever a user names as data: a file, a directory, or a name on a hub."""

from pathlib import Path

from propulsion_export.data.directory import read_directory
from propulsion_export.data.files import kind_of, read_file
from propulsion_export.data.loaded import is_hub_name, is_saved, read_hub, read_saved
from propulsion_export.data.rows import DataRow
from propulsion_export.errors import DataError


def read_rows(source: Path) -> list[DataRow]:
    """Read every row of a file, of a directory with files or a saved data set, or of `owner/name`.

    Raises:
        DataError: the source is missing, empty, of an unknown kind or damaged.
    """
    if source.is_dir():
        rows = list(read_saved(source) if is_saved(source) else read_directory(source))
    elif kind_of(source) is None and is_hub_name(source):
        rows = list(read_hub(source))
    elif not source.exists():
        raise DataError(
            f"{source}: does not exist, expected a file or directory with data, or the name of a "
            "data set on a hub, owner/name"
        )
    else:
        rows = list(read_file(source))
    if not rows:
        raise DataError(f"{source}: holds no rows, expected at least one")
    return rows
