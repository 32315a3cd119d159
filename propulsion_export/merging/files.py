"""The weight files of a merged checkpoint: which tensors lie where, and the index."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.base_model.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint
from propulsion_export.base_model.tensor_files import DTYPES, StoredTensor, file_metadata
from propulsion_export.merging.changes import Change, Copied
from propulsion_export.merging.plan import Plan, written_dtype, written_shape

DEFAULT_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file to write.

    Attributes:
        name: its name.
        header: its first bytes: the length of the header, and the header.
        changes: its tensors by name, in the order they lie in.
        base: the base model's file that has the same header and tensors of the same sizes; None
            if there is none.
    """

    name: str
    header: bytes
    changes: Mapping[str, Change]
    base: Path | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.header) + sum(map(size_of, self.changes.values()))

    @property
    def unchanged(self) -> bool:
        """Whether it is the base model's file byte for byte."""
        return self.base is not None and all(isinstance(c, Copied) for c in self.changes.values())


def size_of(change: Change) -> int:
    """The bytes that are written for a tensor."""
    return math.prod(written_shape(change)) * DTYPES[written_dtype(change)].itemsize


def plan_files(
    plan: Plan, checkpoint: Checkpoint, max_shard_size: int | None = None
) -> list[WeightFile]:
    """Distribute tensors over files.

    The base model's own files, if the same tensors are written in the same dtypes and no file is
    larger than `max_shard_size` bytes; else as few files as that size allows, which is 5 GB then.
    """
    own = _files_of_base(plan, checkpoint)
    if own and max(file.size for file in own) <= (max_shard_size or math.inf):
        return own
    shards = plan_shards(plan.changes, max_shard_size or DEFAULT_SHARD_SIZE)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    metadata = _metadata(checkpoint)
    return [
        WeightFile(name, _header(shard, metadata), shard)
        for name, shard in zip(names if len(names) > 1 else [WEIGHTS_FILE], shards, strict=True)
    ]


def plan_shards(changes: Mapping[str, Change], limit: int) -> list[dict[str, Change]]:
    """The tensors of each shard, in order; a shard has at most `limit` bytes or a single tensor."""
    shards: list[dict[str, Change]] = [{}]
    room = limit
    for name, change in changes.items():
        size = size_of(change)
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = change
        room -= size
    return shards


def index_of(files: Sequence[WeightFile]) -> dict[str, bytes]:
    """The index of several files, by its file's name; empty for one file."""
    if len(files) == 1 and files[0].name == WEIGHTS_FILE:
        return {}
    total = sum(size_of(change) for file in files for change in file.changes.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file.name for file in files for name in file.changes},
    }
    return {INDEX_FILE: (json.dumps(index, indent=2) + "\n").encode()}


def _files_of_base(plan: Plan, checkpoint: Checkpoint) -> list[WeightFile]:
    """The base model's own files; empty where other tensors or other dtypes are written.

    So it is too where two of them hold a tensor of the same name, of which one is read.
    """
    stored = checkpoint.tensors
    if plan.changes.keys() != stored.keys() or any(n != key for n, key in plan.keys.items()):
        return []
    if not all(_lies_alike(plan.changes[name], stored[name]) for name in stored):
        return []
    files = [
        WeightFile(
            file.name,
            _stored_header(file),
            {name: plan.changes[name] for name, tensor in stored.items() if tensor.file == file},
            file,
        )
        for file in dict.fromkeys(tensor.file for tensor in stored.values())
    ]
    whole = all(file.size == base.stat().st_size for file in files if (base := file.base))
    return files if whole else []


def _lies_alike(change: Change, stored: StoredTensor) -> bool:
    """Whether what is written can lie where the stored tensor lies in its file."""
    alike = (written_dtype(change), written_shape(change)) == (stored.dtype, stored.shape)
    return alike and type(stored) is StoredTensor  # not computed from a GGUF file


def _stored_header(file: Path) -> bytes:
    with file.open("rb") as content:
        length = content.read(8)
        return length + content.read(int.from_bytes(length, "little"))


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the base model's headers say beside tensors; torchao describes each parameter there."""
    stored = [tensor for tensor in checkpoint.tensors.values() if type(tensor) is StoredTensor]
    files = dict.fromkeys(tensor.file for tensor in stored)
    found = {name: text for file in files for name, text in file_metadata(file).items()}
    return {**found, "format": "pt"}


def _header(changes: Mapping[str, Change], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, change in changes.items():
        end = offset + size_of(change)
        header[name] = {
            "dtype": written_dtype(change),
            "shape": list(written_shape(change)),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors and want them aligned
    return len(text).to_bytes(8, "little") + text


def total_size(files: Iterable[WeightFile]) -> int:
    """The bytes of all files together."""
    return sum(file.size for file in files)
