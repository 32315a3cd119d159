"""Read the rows of a data set that `datasets` loads: one that it saved, or one on a hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from propulsion_export.data.class_names import classes_by_column, with_class_names
from propulsion_export.data.rows import DataRow
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import DataError, first_line

_SAVED = ("state.json", "dataset_dict.json")


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


def is_saved(directory: Path) -> bool:
    """Whether a directory was written by `save_to_disk`."""
    return any((directory / name).is_file() for name in _SAVED)


def read_saved(directory: Path) -> Iterator[DataRow]:
    """Read a directory written by `save_to_disk`.

    Only the split `train` is read, if there are splits. Class numbers become class names.

    Raises:
        DataError: `datasets` cannot load it, or it has splits and none is `train`.
    """
    import datasets

    refuse_pointers(sorted(directory.rglob("*.arrow")), DataError)
    try:
        loaded = datasets.load_from_disk(str(directory.absolute()))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{directory}: `datasets` cannot load it ({first_line(error)})") from error
    return _rows(directory, loaded)


def read_hub(name: Path) -> Iterator[DataRow]:
    """Read `owner/name` on a hub, as `read_saved` reads; cells of CSV files stay texts.

    Raises:
        DataError: `datasets` cannot load it, or it has splits and none is `train`.
    """
    import datasets

    try:
        with quiet():
            loaded = _load(name.as_posix())
    # A connection that fails is an OSError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: is no local file or directory, and `datasets` cannot load it from a hub "
            f"({first_line(error)})"
        ) from error
    return _rows(name, loaded)


def _load(name: str) -> Any:
    """Load a data set; cells of CSV files are texts, where pandas would read 01 as 1."""
    import datasets

    loaded = datasets.load_dataset(name)
    builder = datasets.load_dataset_builder(name)
    features = next(iter(loaded.values())).features
    if not hasattr(builder.config, "keep_default_na") or classes_by_column(features.to_dict()):
        return loaded
    texts = datasets.Features({column: datasets.Value("string") for column in features})
    return datasets.load_dataset(name, features=texts, keep_default_na=False)


def _rows(source: Path, loaded: Any) -> Iterator[DataRow]:
    if isinstance(loaded, dict):
        if "train" not in loaded:
            raise DataError(f"{source}: has the splits {', '.join(loaded)}, expected 'train'")
        loaded = loaded["train"]
    numbered = ((f"row {number}", row) for number, row in enumerate(loaded, start=1))
    return with_class_names(numbered, loaded.features.to_dict())
