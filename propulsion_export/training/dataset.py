"""Rows of a data set that `datasets` loads, from a directory or by its name on a hub."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from propulsion_export.errors import DataError

# A row as it stands in the file, and how to name it in a message: "line 3", "row 3".
DataRow = tuple[str, Mapping[str, Any]]


def is_hub_name(source: Path) -> bool:
    """Whether a path that may not exist reads like `owner/name`."""
    parts = source.parts
    return (
        len(parts) == 2
        and not parts[0].startswith((".", "~", "/"))
        # In a directory that exists, a file's name was meant.
        and not source.exists()
        and not source.parent.exists()
    )


def read_dataset(source: Path) -> Iterator[DataRow]:
    """A directory written by `save_to_disk`, one of data files, or `owner/name` on a hub.

    The split `train` if there are any. Class numbers become the names that the data set gives them.

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
        with _silence():
            return datasets.load_dataset(source.as_posix())
    # A connection that fails is an OSError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        found = "`datasets` cannot load it"
        if not source.exists():
            found = f"is no local file or directory, and {found} from a hub"
        raise DataError(f"{source}: {found} ({reason})") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Neither bars nor a line for each attempt to reach a hub."""
    import datasets

    hub = logging.getLogger("huggingface_hub")
    level, bars = hub.level, not datasets.are_progress_bars_disabled()
    hub.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
