"""The files of a sentence-transformers pipeline: `modules.json` and the folders it names."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from propulsion_export.base_model.config import read_settings_file
from propulsion_export.base_model.hub import locate
from propulsion_export.errors import BaseModelError

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
# The transformer's own settings; the first that exists counts.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
WEIGHTS_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
_OURS = "sentence_transformers."

Find = Callable[[str], Path | None]


@dataclass(frozen=True)
class Module:
    """One module of `modules.json`: the class's name and its folder, as a prefix of file names."""

    kind: str
    folder: str
    source: str
    find: Find

    @property
    def where(self) -> str:
        return f"{self.source}: {self.kind} in {self.folder or '.'}"

    def file(self, name: str) -> Path | None:
        return self.find(self.folder + name)

    def settings(self, name: str = "config.json") -> dict[str, Any]:
        file = self.file(name)
        return {} if file is None else read_settings_file(file)


def copy_sentence_pipeline(source: str | Path, directory: Path) -> None:
    """Copy a pipeline's files, unchanged, into an artifact's directory; there may be none."""
    for name, file in sentence_files(source).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, directory / name)


def sentence_files(source: str | Path) -> dict[str, Path]:
    """Where the files of a pipeline are, by the path that each has beside the model."""
    find = find_in(source)
    found = {name: find(name) for name in _file_names(str(source), find)}
    return {name: file for name, file in found.items() if file is not None}


def find_in(source: str | Path) -> Find:
    """Where a file is; of a local directory without transformers, which serving does not have."""
    directory = Path(source)
    if not directory.is_dir():
        return partial(locate, str(source))
    return lambda name: file if (file := directory / name).is_file() else None


def _file_names(source: str, find: Find) -> Iterator[str]:
    modules = list_modules(source, find)
    if modules is None:
        return
    yield from (MODULES_FILE, SETTINGS_FILE, *TRANSFORMER_FILES)
    for folder in (module.folder for module in modules if module.folder):
        yield from (f"{folder}config.json", f"{folder}{WEIGHTS_FILE}")


def list_modules(source: str, find: Find) -> list[Module] | None:
    """The modules in order, the transformer first."""
    file = find(MODULES_FILE)
    if file is None:
        return None
    modules = [
        Module(_kind(entry["type"]), _folder(file, entry["path"]), source, find)
        for entry in _entries(file)
    ]
    if not modules or modules[0].kind != "Transformer":
        found = modules[0].kind if modules else "no module"
        raise BaseModelError(f"{file}: begins with {found}, expected a Transformer")
    if modules[0].folder:
        raise BaseModelError(
            f"{file}: has its Transformer in {modules[0].folder}, expected it beside modules.json",
            remedy="Load it in sentence-transformers and save it again.",
        )
    _check_folders(file, modules)
    return modules


def _check_folders(file: Path, modules: list[Module]) -> None:
    """Refuse folders whose files would take the place of others of a model or an artifact."""
    for module in modules[1:]:
        needs_one = module.kind not in ("Normalize", "Dropout")
        if (needs_one and not module.folder) or module.folder.startswith("adapters/"):
            raise BaseModelError(
                f"{file}: has {module.kind} in {module.folder or 'the same folder'}, expected a "
                "folder of its own such as 1_Pooling"
            )


def _entries(file: Path) -> list[dict[str, str]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file}: cannot be read ({error})") from error
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise BaseModelError(f"{file}: is no list of modules, expected `type` and `path` of each")
    return entries


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("type", "path")
    )


def _kind(reference: str) -> str:
    """The class's name; the whole reference where it is not one of sentence-transformers."""
    return reference.rpartition(".")[2] if reference.startswith(_OURS) else reference


def _folder(file: Path, path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path:
        raise BaseModelError(f"{file}: the path {path!r} leads out of the directory")
    return f"{parts.as_posix()}/" if parts.parts else ""
