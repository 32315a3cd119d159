"""Copy the Python modules that a model brings (`auto_map`), without running them.

A reference is `module.Class`, a module of the model itself, or `owner/name--module.Class`, one on a
hub, which stays there. Modules lie beside each other and import each other by `from .module`.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from propulsion_export.base_model.hub import leads_inside, locate
from propulsion_export.errors import BaseModelError

AUTO_MAP = "auto_map"


def copy_code(source: str, directory: Path, auto_map: Any) -> list[str]:
    """Copy the modules that an `auto_map` names, and those that they import, from a model.

    Args:
        source: the model's directory or name.
        directory: an existing directory; modules keep their place inside the model.
        auto_map: what a configuration holds: references, or lists of them, by auto class.

    Returns:
        The names of the files copied.

    Raises:
        BaseModelError: a module is missing, or its name leads out of the model.
    """
    files = modules_of(source, auto_map)
    for name, file in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, directory / name)
    return list(files)


def modules_of(source: str, auto_map: Any) -> dict[str, Path]:
    """Where each module is that an `auto_map` needs, by its place inside the model.

    Raises:
        BaseModelError: as for `copy_code`.
    """
    found: dict[str, Path] = {}
    for name, file in _needed(source, auto_map):
        if file is None:
            raise _missing(source, name)
        found[name] = file
    return found


def present_modules(source: str, auto_map: Any) -> dict[str, Path]:
    """As `modules_of`, of those modules that the model has."""
    return {name: file for name, file in _needed(source, auto_map) if file is not None}


def own_modules(auto_map: Any) -> list[str]:
    """The files of the modules that are the model's own, such as `code.py`, in their order.

    Those on a hub are left out.

    Args:
        auto_map: as for `copy_code`; or references alone, as old tokenizers have them.
    """
    references: Iterable[Any] = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    flat = [
        reference
        for value in references
        for reference in (value if isinstance(value, list | tuple) else [value])
    ]
    named = [text for text in flat if isinstance(text, str) and "--" not in text and "." in text]
    return list(dict.fromkeys(f"{text.rpartition('.')[0]}.py" for text in named))


def _needed(source: str, auto_map: Any) -> Iterator[tuple[str, Path | None]]:
    """Each module that an `auto_map` names or that another imports; None where it is missing."""
    seen: set[str] = set()
    wanted = sorted(own_modules(auto_map))
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        file = locate(source, name) if leads_inside(name) else None
        yield name, file
        if file is not None:
            from transformers.dynamic_module_utils import get_relative_imports

            beside = PurePosixPath(name).parent
            wanted += [f"{beside / module}.py" for module in get_relative_imports(file)]


def _missing(source: str, name: str) -> BaseModelError:
    if not leads_inside(name):
        return BaseModelError(f"{source}: {AUTO_MAP} names {name}, expected a module of the model")
    return BaseModelError(
        f"{source}: has no {name}, expected the code that its {AUTO_MAP} needs",
        remedy="Copy the whole model again.",
    )
