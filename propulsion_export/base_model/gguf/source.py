"""Which GGUF file the name of a base model means."""

import re
from pathlib import Path

from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import BaseModelError

ENDING = ".gguf"
MAGIC = b"GGUF"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def find_gguf(source: str | Path) -> Path | None:
    """The GGUF file that a base model's path means: the file itself, or the one in a directory.

    Returns:
        None for a name on a hub, and for a directory without a GGUF file or with a transformers
        checkpoint in safetensors.

    Raises:
        BaseModelError: there is no such file, it is one part of several, only the pointer that
            git-lfs left is there, or a directory holds several.
    """
    path = user_path(source)
    if path.is_dir():
        return _only_file(path)
    if path.suffix.lower() == ENDING and not path.exists():
        raise BaseModelError(
            f"{source}: does not exist, expected a GGUF file",
            remedy="Give the base model's file with -m.",
        )
    return _whole(path) if is_gguf(path) else None


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its ending or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ENDING:
        return True
    with path.open("rb") as content:
        return content.read(len(MAGIC)) == MAGIC


def holds_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a directory with some."""
    return is_gguf(path) or next(path.glob(f"*{ENDING}"), None) is not None


def _only_file(directory: Path) -> Path | None:
    files = sorted(file for file in directory.glob(f"*{ENDING}") if file.is_file())
    if not files or _has_checkpoint(directory):
        return None
    if len(files) > 1 and not _PART.search(files[0].name):
        raise BaseModelError(
            f"{directory}: holds {len(files)} GGUF files ({', '.join(f.name for f in files[:4])}), "
            "expected one",
            remedy="Give the path of the file.",
        )
    return _whole(files[0])


def _has_checkpoint(directory: Path) -> bool:
    config = (directory / "config.json").is_file()
    return config and next(directory.glob("*.safetensors"), None) is not None


def _whole(file: Path) -> Path:
    refuse_pointers([file], BaseModelError)
    if part := _PART.search(file.name):
        raise BaseModelError(
            f"{file}: is part {int(part[1])} of {int(part[2])}, expected a whole GGUF file",
            remedy="Join the parts with llama.cpp's `llama-gguf-split --merge`.",
        )
    return file
