"""Read the rows of a data set that `datasets` loads, from a directory or a hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import DataError, first_line

# The name of a row in messages, such as "line 3" or "row 3", and the row as it is in the file.
DataRow = tuple[str, Mapping[str, Any]]


def is_hub_name(source: Path) -> bool:
    """Whether the path is no local file and has the form `owner/name`."""
    parts = source.parts
    return (
        len(parts) == 2
        and not parts[0].startswith((".", "~", "/"))
        # If the directory exists, a file in it was meant.
        and not source.exists()
        and not source.parent.exists()
    )


def read_dataset(source: Path) -> Iterator[DataRow]:
    """Read a directory written by `save_to_disk`, one of data files, or `owner/name` on a hub.

    Only the split `train` is read, if there are splits. Class numbers become class names.

    Raises:
        DataError: `datasets` cannot load it, or it has splits and none is `train`.
    """
    import datasets

    loaded = _load(source)
    if isinstance(loaded, dict):
        if "train" not in loaded:
            raise DataError(f"{source}: has the splits {', '.join(loaded)}, expected 'train'")
        loaded = loaded["train"]
    names = {
        column: feature.names
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(loaded, start=1):
        named = {column: names[column][row[column]] for column in names if row[column] is not None}
        yield f"row {number}", row | named


def _load(source: Path) -> Any:
    import datasets

    try:
        if (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(source))
        with quiet():
            return datasets.load_dataset(source.as_posix())
    # A connection that fails is an OSError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        found = "`datasets` cannot load it"
        if not source.exists():
            found = f"is no local file or directory, and {found} from a hub"
        raise DataError(f"{source}: {found} ({first_line(error)})") from error
