"""The chat template that an adapter brings beside its weights, which it was trained with."""

from collections.abc import Mapping
from pathlib import Path

from propulsion_export.base_model.chat.templates import read_template
from propulsion_export.errors import AdapterError, ArtifactError


def own_template(directory: Path) -> str | None:
    """The chat template in an adapter's directory; None without one.

    Raises:
        AdapterError: it cannot be read.
    """
    try:
        return read_template(directory)
    except ArtifactError as error:
        raise AdapterError(*error.findings) from error


def own_templates(directories: Mapping[str, Path]) -> dict[str, str]:
    """The chat templates of the adapters that bring one, by name.

    Raises:
        AdapterError: one cannot be read.
    """
    found = {name: own_template(directory) for name, directory in directories.items()}
    return {name: template for name, template in found.items() if template is not None}
