"""Where the weights of a checkpoint are stored: safetensors files, by directory or name, or GGUF.

Reads headers alone, and safetensors without torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.base_model.hub import locate
from propulsion_export.base_model.tensor_files import DTYPES, StoredTensor, stored_tensors
from propulsion_export.errors import BaseModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint on disk.

    Attributes:
        source: the checkpoint's directory, name, or GGUF file.
        tensors: where each tensor is stored, by its name in the checkpoint; those of a GGUF file
            are in float32 and have the names of parameters.
    """

    source: str
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def find(cls, source: str) -> "Checkpoint":
        """Locate a checkpoint's weight files by directory or name, and read their headers.

        Args:
            source: a directory, a name, or a GGUF file.

        Raises:
            BaseModelError: it has none; one is missing, truncated or damaged.
        """
        if find_gguf(source) is not None:
            from propulsion_export.base_model.gguf.unpacked import unpacked_tensors

            return cls(source, unpacked_tensors(source))
        tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(source):
            tensors |= stored_tensors(file)
        return cls(source, tensors)


@dataclass(frozen=True)
class Entries:
    """A stored tensor as a fingerprint reads it: a few of its entries, and numpy's dtype."""

    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> str:
        """Such as `bfloat16`."""
        return str(DTYPES[self.stored.dtype])

    def __getitem__(self, place: tuple[int, ...]) -> float:
        """One entry, by its position on every axis."""
        return self.stored[place]


def _weight_files(source: str) -> list[Path]:
    # transformers also prefers the single file to the index.
    index = None
    if locate(source, WEIGHTS_FILE) is None:
        index = locate(source, INDEX_FILE)
    names = {WEIGHTS_FILE} if index is None else _names_in_index(index)
    files = []
    for name in sorted(names):
        file = locate(source, name)
        if file is None:
            raise BaseModelError(
                f"{source}: has no {name}, expected weights in safetensors",
                remedy="Save it with save_pretrained, or copy it again.",
            )
        files.append(file)
    return files


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
