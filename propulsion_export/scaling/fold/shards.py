"""Write safetensors in shards, one tensor at a time: they need not be in memory together."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

# The safetensors format's names of torch's dtypes.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _size(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * dtype.itemsize


def plan_shards(
    names: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], limit: int
) -> list[list[str]]:
    """Names for each shard, in order; a shard has at most `limit` bytes or a single tensor."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in names.items():
        size = _size(tensor, dtypes[name])
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


class ShardWriter:
    """Write safetensors files, the headers first and then each tensor as it is computed.

    The format: 8 bytes, little endian, the header's length; the header, JSON; the tensors' bytes.
    """

    def __init__(
        self,
        directory: Path,
        names: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        shards: list[list[str]],
    ) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        count = len(shards)
        for index, shard in enumerate(shards, 1):
            name = (
                SAFE_WEIGHTS_NAME if count == 1 else f"model-{index:05}-of-{count:05}.safetensors"
            )
            self._write_header(directory / name, shard, names, dtypes)
        if count > 1:
            total = sum(_size(tensor, dtypes[name]) for name, tensor in names.items())
            index_file = {
                "metadata": {"total_size": total},
                "weight_map": {name: place[0].name for name, place in self._places.items()},
            }
            text = json.dumps(index_file, indent=2) + "\n"
            (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

    def _write_header(
        self,
        file: Path,
        shard: list[str],
        names: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in shard:
            end = offset + _size(names[name], dtypes[name])
            header[name] = {
                "dtype": DTYPE_NAMES[dtypes[name]],
                "shape": list(names[name].shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # readers map the tensors and want them aligned
        for name in shard:
            start = 8 + len(text) + header[name]["data_offsets"][0]
            self._places[name] = (file, start)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + offset)

    def __enter__(self) -> "ShardWriter":
        self._open = {
            file: file.open("r+b") for file in {file for file, _ in self._places.values()}
        }
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at the offset that its file's header gives."""
        file, start = self._places[name]
        self._open[file].seek(start)
        self._open[file].write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(self, *_: object) -> None:
        for out in self._open.values():
            out.close()
