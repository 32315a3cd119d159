"""Read the adapters that a caller names as `DIR` or `NAME=DIR`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import check_name, name_of
from propulsion_export.base_model.gguf.source import holds_gguf
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import AdapterError, UsageError


def read_adapters(specifications: Sequence[str | Path]) -> list[Adapter]:
    """Read adapters, each given as `DIR` or `NAME=DIR`.

    Raises:
        UsageError: two adapters have the same name, or a name is not allowed.
        AdapterError: an adapter cannot be read.
    """
    adapters: list[Adapter] = []
    for specification in specifications:
        name, directory = _split(specification)
        adapter = Adapter.read(directory, check_name(name_of(directory) if name is None else name))
        if adapter.base is not None:
            adapter = replace(adapter, base=_beside(adapter.base, directory))
        if adapter.name in {other.name for other in adapters}:
            raise UsageError(
                f"two adapters are called {adapter.name!r}, expected different names",
                remedy="Name them: -a one=DIR -a two=DIR.",
            )
        adapters.append(adapter)
    return adapters


def source_of(specification: str | Path) -> str:
    """The absolute directory of an adapter given as `DIR` or `NAME=DIR`."""
    return str(_split(specification)[1].resolve())


def _split(specification: str | Path) -> tuple[str | None, Path]:
    """The name, if one is given, and the directory; an existing path may contain `=`.

    Raises:
        UsageError: it is neither a text nor a path.
    """
    if not isinstance(specification, str | Path):
        kind = type(specification).__name__
        raise UsageError(f"adapter: is {kind}, expected a directory, or NAME=DIR")
    whole = user_path(specification)
    name, separator, path = str(specification).partition("=")
    if separator and not os.path.lexists(whole):  # unlike Path.exists() it never raises
        return name, user_path(path)
    return None, whole


def _beside(base: str, directory: Path) -> str:
    """Find a base model's relative path from the current or the adapter's directory."""
    for place in (Path(base), directory / base, directory.parent / base):
        if (place / "config.json").is_file() or holds_gguf(place):
            return str(place.resolve())
    return base


def check_identity(adapter: Adapter) -> None:
    """Refuse an adapter that changes nothing, because it is untrained or its weights got lost.

    Raises:
        AdapterError: all scales are 1 and there is no trained bias.
    """
    if adapter.is_identity():
        raise AdapterError(
            f"adapter {adapter.name}: all its scales are 1 and no bias was trained, so it changes "
            "nothing",
            remedy="Is this the trained adapter?",
        )
