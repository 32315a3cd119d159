"""What the README.md of a data set says about its files: which are to train on, and the classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from propulsion_export.errors import DataError, first_line


@dataclass(frozen=True)
class Card:
    """The settings at the head of a data set's README.md.

    Attributes:
        patterns: patterns of the files to train on; None where the card names no files.
        features: the columns as `datasets` describes them in JSON; empty where it does not.
    """

    patterns: tuple[str, ...] | None = None
    features: Mapping[str, Any] = field(default_factory=dict)


def read_card(directory: Path) -> Card:
    """Read a directory's card; an empty one where there is none.

    Raises:
        DataError: the card is damaged, or has several configurations and none is the default.
    """
    file = directory / "README.md"
    if not file.is_file():
        return Card()
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    try:
        settings = metadata_load(file) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file}: its head cannot be read ({first_line(error)})") from error
    configurations = settings.get("configs") or []
    if not isinstance(configurations, list) or not all(isinstance(c, dict) for c in configurations):
        raise DataError(f"{file}: its configs are {configurations!r}, expected a list of settings")
    chosen = _configuration(file, configurations)
    return Card(_patterns(chosen), _features(file, settings, chosen.get("config_name", "default")))


def _configuration(file: Path, configurations: list[dict[str, Any]]) -> dict[str, Any]:
    """The only configuration, or the default one; empty if there is none."""
    if not configurations:
        return {}
    if len(configurations) == 1:
        return configurations[0]
    names = [str(one.get("config_name", "default")) for one in configurations]
    for name, one in zip(names, configurations, strict=True):
        if one.get("default") or name == "default":
            return one
    raise DataError(
        f"{file}: has the configurations {', '.join(names)}, expected one or a default",
        remedy="Give the file or folder of one.",
    )


def _patterns(configuration: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns of the files of `train`, or of all files if the card names no splits."""
    folder = configuration.get("data_dir")
    files = configuration.get("data_files")
    if files is None:
        return (f"{folder}/**/*",) if folder else None
    if isinstance(files, list) and all(isinstance(one, dict) for one in files):
        files = {one.get("split", "train"): one.get("path") for one in files}
    if isinstance(files, dict):
        files = files.get("train", [])
    files = [files] if isinstance(files, str) else files or []
    return tuple(f"{folder}/{one}" if folder else str(one) for one in files)


def _features(file: Path, settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The columns with their classes that the card describes, for one configuration."""
    if "dataset_info" not in settings:
        return {}
    from datasets.info import DatasetInfosDict

    try:
        infos = DatasetInfosDict.from_dataset_card_data(settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file}: its dataset_info cannot be read ({first_line(error)})") from error
    info = infos.get(name) or next(iter(infos.values()), None)
    return info.features.to_dict() if info is not None and info.features else {}
