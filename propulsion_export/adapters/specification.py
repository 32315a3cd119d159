"""What every verb starts with: adapters and texts read, the base model found and recognised."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import check_name
from propulsion_export.errors import (
    AdapterError,
    UsageError,
)


def read_adapters(specifications: Sequence[str | Path]) -> list[Adapter]:
    """Read `DIR` or `NAME=DIR` each; names are unique and fit into file names.

    Raises:
        UsageError: two of one name, or a name that is reserved or unfit.
        AdapterError: one cannot be read.
    """
    adapters: list[Adapter] = []
    for specification in specifications:
        name, directory = _split(specification)
        adapter = Adapter.read(
            directory, check_name(directory.absolute().name if name is None else name)
        )
        if adapter.base is not None:
            adapter = replace(adapter, base=_beside(adapter.base, directory))
        if adapter.name in {other.name for other in adapters}:
            raise UsageError(
                f"two adapters are called {adapter.name!r}, expected names of their own",
                remedy="Name them: -a one=DIR -a two=DIR.",
            )
        adapters.append(adapter)
    return adapters


def source_of(specification: str | Path) -> str:
    """Where an adapter given as `DIR` or `NAME=DIR` lies, absolute."""
    return str(_split(specification)[1].resolve())


def _split(specification: str | Path) -> tuple[str | None, Path]:
    """Name, if one is given, and directory; a directory that exists is one, `=` or not."""
    whole = Path(specification).expanduser()
    name, separator, path = str(specification).partition("=")
    if separator and not os.path.lexists(whole):  # which, of any text, does not raise
        return name, Path(path).expanduser()
    return None, whole


def _beside(base: str, directory: Path) -> str:
    """A base model named by a relative path, found from here or from the adapter's place."""
    for place in (Path(base), directory / base, directory.parent / base):
        if (place / "config.json").is_file():
            return str(place.resolve())
    return base


def check_identity(adapter: Adapter) -> None:
    """Refuse an adapter whose layers do nothing: untrained, or lost on the way.

    Raises:
        AdapterError: all its scales are one.
    """
    if adapter.is_identity():
        raise AdapterError(
            f"adapter {adapter.name}: all its scales are 1 and no bias was trained, so it changes "
            "nothing",
            remedy="Is this the trained adapter?",
        )
