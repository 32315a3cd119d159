"""Read the safetensors of a checkpoint, tensor by tensor or entry by entry."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from propulsion_export.base_model.hub import locate
from propulsion_export.errors import BaseModelError
from propulsion_export.scaling.fold.shards import DTYPE_NAMES


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors of a checkpoint: which file holds which tensor."""

    source: str
    files: Mapping[str, Path]

    @classmethod
    def find(cls, source: str) -> "Checkpoint":
        """Locate a checkpoint's weight files by directory or name.

        Raises:
            BaseModelError: it has none, or one is missing, truncated or damaged.
        """
        # As transformers does: the single file goes before the index.
        index = None
        if locate(source, SAFE_WEIGHTS_NAME) is None:
            index = locate(source, SAFE_WEIGHTS_INDEX_NAME)
        names = {SAFE_WEIGHTS_NAME} if index is None else _names_in_index(index)
        files: dict[str, Path] = {}
        for name in sorted(names):
            file = locate(source, name)
            if file is None:
                raise BaseModelError(
                    f"{source}: has no {name}, expected weights in safetensors",
                    remedy="Save it with save_pretrained, or copy it again.",
                )
            files |= dict.fromkeys(_keys(file), file)
        return cls(source, files)

    def read(self, key: str) -> torch.Tensor:
        """One tensor."""
        with safe_open(self.files[key], framework="pt") as content:
            return content.get_tensor(key)  # type: ignore[no-any-return]


class StoredTensor:
    """A matrix on disk that can tell its shape and single entries."""

    def __init__(self, file: Path, key: str) -> None:
        with safe_open(file, framework="pt") as content:
            part = content.get_slice(key)
            self.shape = tuple(part.get_shape())
            self.dtype = _torch_dtype(part.get_dtype())
        self._file, self._key = file, key

    def __getitem__(self, place: tuple[int, int]) -> float:
        row, column = place
        with safe_open(self._file, framework="pt") as content:
            part = content.get_slice(self._key)[row : row + 1, column : column + 1]
            return float(part.item())


def _names_in_index(index: Path) -> set[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{index}: is no index of weight files ({error!r})", remedy="Copy it again."
        ) from error
    if outside := sorted(str(name) for name in names if name != Path(str(name)).name):
        raise BaseModelError(f"{index}: names {outside[0]}, expected a file beside it")
    return names


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{file}: is truncated or damaged ({error})", remedy="Copy it again."
        ) from error


def _torch_dtype(name: str) -> torch.dtype:
    known = {text: dtype for dtype, text in DTYPE_NAMES.items()}
    if name not in known:
        raise BaseModelError(
            f"a tensor of the checkpoint is of the type {name}, expected one of {', '.join(known)}",
            remedy="Save the base model without quantisation.",
        )
    return known[name]
