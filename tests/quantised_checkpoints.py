"""Quantised modules and checkpoints of random weights, and a plain writer of what a merge changes.

Dequantisers here are written from the formats' own descriptions and share nothing with the package;
compressed-tensors is judged by its own library.
"""

import numpy as np
import torch
from safetensors.torch import save_file

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, stored_tensors
from propulsion_export.merging.changes import Copied, Given, Scaled

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {DTYPES[name]: name for name in TORCH_DTYPES}
# How far a product may be off, relatively, after one rounding to a dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def stored(directory, tensors, name="model.safetensors"):
    """Torch tensors by name, written and found again."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / name)
    return stored_tensors(directory / name)


def written(change):
    """The values that a change writes."""
    match change:
        case Copied():
            return change.stored.read()
        case Scaled():
            values = change.stored.read()
            dtype = DTYPES[change.dtype] if change.dtype else values.dtype
            return rounded(values.astype(np.float64) * change.factors, dtype)
        case Given():
            return change.values


def as_torch(values):
    """A numpy array, of any of the format's types, as a tensor."""
    dtype = TORCH_DTYPES[_NAMES[values.dtype]]
    plain = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return torch.from_numpy(plain.copy()).view(dtype).reshape(values.shape)


def merged(tensors, changes):
    """All tensors of the merged checkpoint, as torch tensors by name."""
    kept = {name: Copied(tensor) for name, tensor in tensors.items()}
    return {name: as_torch(written(change)) for name, change in {**kept, **changes}.items()}


def packed(values, bits):
    """Unsigned integers [lines, count] as int32 words [lines, count * bits / 32], without gaps."""
    stream = (values[:, :, None].astype(np.int64) >> np.arange(bits)) & 1
    stream = stream.reshape(len(values), -1)
    padding = -stream.shape[1] % 32
    stream = np.pad(stream, ((0, 0), (0, padding))).reshape(len(values), -1, 32)
    words = (stream << np.arange(32)).sum(-1).astype(np.uint32)
    return words.view(np.int32)


def unpacked(words, bits, count):
    """The other way round."""
    stream = (words.view(np.uint32)[:, :, None].astype(np.int64) >> np.arange(32)) & 1
    stream = stream.reshape(len(words), -1)[:, : count * bits].reshape(len(words), count, bits)
    return (stream << np.arange(bits)).sum(-1)
