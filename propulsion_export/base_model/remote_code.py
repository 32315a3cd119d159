"""Copy the Python modules that a model brings (`auto_map`), without running them.

A reference is `module.Class`, a module of the model itself, or `owner/name--module.Class`, one on a
hub, which stays there. Modules lie beside each other and import each other by `from .module`.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from propulsion_export.base_model.hub import locate
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
    from transformers.dynamic_module_utils import get_relative_imports

    found: dict[str, Path] = {}
    wanted = sorted(_own_modules(auto_map))
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = _file(source, name)
        beside = PurePosixPath(name).parent
        wanted += [f"{beside / module}.py" for module in get_relative_imports(found[name])]
    return found


def _own_modules(auto_map: Any) -> set[str]:
    """The files of the modules that are the model's own; those on a hub are left out."""
    references: Iterable[Any] = auto_map.values() if isinstance(auto_map, Mapping) else ()
    flat = [
        reference
        for value in references
        for reference in (value if isinstance(value, list | tuple) else [value])
    ]
    named = [text for text in flat if isinstance(text, str) and "--" not in text and "." in text]
    return {f"{text.rpartition('.')[0]}.py" for text in named}


def _file(source: str, name: str) -> Path:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise BaseModelError(f"{source}: {AUTO_MAP} names {name}, expected a module of the model")
    file = locate(source, name)
    if file is None:
        raise BaseModelError(
            f"{source}: has no {name}, expected the code that its {AUTO_MAP} needs",
            remedy="Copy the whole model again.",
        )
    return file
