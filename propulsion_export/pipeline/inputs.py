"""What every verb starts with: adapters and texts read, the base model found and recognised."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from propulsion_export.adapter import Adapter
from propulsion_export.errors import AdapterError, BaseModelError, DataError, UsageError
from propulsion_export.fingerprint import Fingerprint
from propulsion_export.manifest import BASE_NAME, is_fit_name
from propulsion_export.scales import Array

# Told how far a verb has come: a share between 0 and 1, and what is being done.
Progress = Callable[[float, str], None]


def silent(share: float, message: str) -> None:
    """The progress of nobody watching."""


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


def check_name(name: str) -> str:
    """The name, if an adapter may be called so.

    Raises:
        UsageError: it is reserved, or no file could have it.
    """
    if name == BASE_NAME:
        raise UsageError(
            f"an adapter cannot be called {name!r}, which means the base model without one",
            remedy="Name it: -a NAME=DIR.",
        )
    if not is_fit_name(name):
        raise UsageError(
            f"an adapter cannot be called {name!r}, because the name becomes a file's",
            remedy="Name it: -a NAME=DIR.",
        )
    return name


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


def read_texts(file: Path) -> list[str]:
    """Texts of a file, a line each, or the `text` of each line of a `.jsonl`.

    Raises:
        DataError: the file is missing, empty, or a line of it has no text.
    """
    try:
        # Not splitlines(): it also cuts at U+2028, which JSON allows inside a text.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error})") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataError(f"{file}: is empty, expected a text a line")
    if file.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}: line {number} is no JSON object with a `text` ({error})"
            ) from error
        if not isinstance(texts[-1], str):
            raise DataError(f"{file}: line {number} has a `text` that is not a string")
    return texts


def base_source(model: str | None, adapters: Sequence[Adapter]) -> str:
    """Where the base model is: as said, else where the adapters say.

    Raises:
        UsageError: nobody says.
    """
    if model is not None:
        return absolute(model)
    told = {adapter.base for adapter in adapters if adapter.base}
    if len(told) != 1:
        found = f"name the bases {', '.join(sorted(told))}" if told else "do not name a base model"
        raise UsageError(f"the adapters {found}, expected one", remedy="Give it with -m.")
    return absolute(told.pop())


def _beside(base: str, directory: Path) -> str:
    """A base model named by a relative path, found from here or from the adapter's place."""
    for place in (Path(base), directory / base, directory.parent / base):
        if (place / "config.json").is_file():
            return str(place.resolve())
    return base


def absolute(source: str) -> str:
    """A local path made absolute, so that an artifact finds it from anywhere; a name as it is."""
    directory = Path(source).expanduser()
    return str(directory.resolve()) if directory.exists() else source


def check_base(
    found: Fingerprint,
    source: str,
    adapters: Sequence[Adapter],
    *,
    remedy: str = "Give the model it was trained on with -m.",
) -> None:
    """Refuse adapters that were trained on another base model.

    Raises:
        BaseModelError: naming the adapter and where the weights differ.
    """
    strangers = [
        f"{source}: is not the base model of adapter {adapter.name} ({difference})"
        for adapter in adapters
        if adapter.fingerprint and (difference := adapter.fingerprint.difference(found))
    ]
    if strangers:
        raise BaseModelError(*strangers, remedy=remedy)


def labels_of(adapters: Sequence[Adapter], label_parameters: frozenset[str]) -> int | None:
    """The most labels that any adapter's head has; None when none brings a head."""
    counts = [
        values.shape[0]
        for adapter in adapters
        for name, values in adapter.modules.items()
        if name in label_parameters
    ]
    return max(counts, default=None)


def with_room(adapter: Adapter, labels: int | None, label_parameters: frozenset[str]) -> Adapter:
    """The adapter with its head padded by zero rows to `labels` labels."""
    if labels is None:
        return adapter
    modules = {
        name: _padded(values, labels) if name in label_parameters else values
        for name, values in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def without_scales(adapter: Adapter) -> Adapter:
    """What is left when the scales and trained biases are taken away: the head."""
    return replace(adapter, scales={}, biases={})


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


def _padded(values: Array, rows: int) -> Array:
    padded = np.zeros((rows, *values.shape[1:]), values.dtype)
    padded[: values.shape[0]] = values
    return padded
