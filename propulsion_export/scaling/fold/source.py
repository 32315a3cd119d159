"""Read the weights of a checkpoint, tensor by tensor or entry by entry."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from propulsion_export.base_model.gguf.weights import GgufTensor, gguf_tensors
from propulsion_export.base_model.hub import locate
from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import BaseModelError
from propulsion_export.scaling.fold.shards import DTYPE_NAMES

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, which starts at byte `offset`; not in memory."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        # Not by safe_open, which parses the file's header and maps all of the file each time.
        size = math.prod(self.shape) * self.dtype.itemsize
        data = np.fromfile(self.file, np.uint8, size, offset=self.offset)
        return torch.from_numpy(data).view(self.dtype).reshape(self.shape)

    def __getitem__(self, place: tuple[int, ...]) -> float:
        """One entry, by its position on every axis."""
        size = self.dtype.itemsize
        start = self.offset + int(np.ravel_multi_index(place, self.shape)) * size
        data = np.fromfile(self.file, np.uint8, size, offset=start)
        return float(torch.from_numpy(data).view(self.dtype).item())


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint on disk.

    Attributes:
        source: the checkpoint's directory, name, or GGUF file.
        tensors: where each tensor is stored, by its name in the checkpoint; those of a GGUF file
            are in float32 and have the names of parameters.
    """

    source: str
    tensors: Mapping[str, StoredTensor | GgufTensor]

    @classmethod
    def find(cls, source: str) -> "Checkpoint":
        """Locate a checkpoint's weight files by directory or name, and read their headers.

        Args:
            source: a directory, a name, or a GGUF file.

        Raises:
            BaseModelError: it has none; one is missing, truncated or damaged, or holds a tensor of
                a type that cannot be folded.
        """
        unpacked = gguf_tensors(source)
        if unpacked is not None:
            return cls(source, unpacked)
        # transformers also prefers the single file to the index.
        index = None
        if locate(source, SAFE_WEIGHTS_NAME) is None:
            index = locate(source, SAFE_WEIGHTS_INDEX_NAME)
        names = {SAFE_WEIGHTS_NAME} if index is None else _names_in_index(index)
        tensors: dict[str, StoredTensor] = {}
        for name in sorted(names):
            file = locate(source, name)
            if file is None:
                raise BaseModelError(
                    f"{source}: has no {name}, expected weights in safetensors",
                    remedy="Save it with save_pretrained, or copy it again.",
                )
            tensors |= _tensors_in(file)
        return cls(source, tensors)


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


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, from its header."""
    try:
        with safe_open(file, framework="pt") as content:
            slices = {name: content.get_slice(name) for name in content.offset_keys()}
            headers = {name: (s.get_shape(), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        check_permission(file, BaseModelError)
        raise BaseModelError(
            f"{file}: is truncated or damaged ({error})", remedy="Copy it again."
        ) from error
    sizes = {name: _size(file, name, *header) for name, header in headers.items()}
    # The format leaves no gaps: the tensors, in the order of their offsets, end the file.
    offset = file.stat().st_size - sum(sizes.values())
    tensors = {}
    for name, (shape, dtype) in headers.items():
        tensors[name] = StoredTensor(file, offset, tuple(shape), _TORCH_DTYPES[dtype])
        offset += sizes[name]
    return tensors


def _size(file: Path, name: str, shape: list[int], dtype: str) -> int:
    """Bytes of a tensor."""
    if dtype not in _TORCH_DTYPES:
        raise BaseModelError(
            f"{file}: {name} is of the type {dtype}, expected one of {', '.join(_TORCH_DTYPES)}",
            remedy="Save the base model without quantisation.",
        )
    return math.prod(shape) * _TORCH_DTYPES[dtype].itemsize
