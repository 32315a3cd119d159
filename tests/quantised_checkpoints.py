"""Quantised modules and checkpoints of random weights, and a plain writer of what a merge changes.

Dequantisers here are written from the formats' own descriptions and share nothing with the package;
compressed-tensors is judged by its own library.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, file_metadata, stored_tensors
from propulsion_export.merging.changes import Computed, Copied, Given, Scaled, all_changes
from propulsion_export.merging.quantised.folding import quantised_changes
from propulsion_export.merging.quantised.layouts import find_layout

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
        case Given() | Computed():
            return change.values


def as_torch(values):
    """A numpy array, of any of the format's types, as a tensor."""
    dtype = TORCH_DTYPES[_NAMES[values.dtype]]
    plain = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return torch.from_numpy(plain.copy()).view(dtype).reshape(values.shape)


def merged(tensors, changes):
    """All tensors of the merged checkpoint, as torch tensors by name."""
    every = all_changes(tensors, changes)
    return {name: as_torch(written(change)) for name, change in every.items()}


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


def gptq_module(
    rng, outputs, inputs, *, bits=4, group=8, dtype=torch.float16, act_order=False, weight=None
):
    """A GPTQ module (format 1) of random weights rounded to the nearest: its tensors by last name.

    Returns the tensors and the integers less their zero points, float64 [outputs, inputs], which
    are multiplied with scales to get the weights.
    """
    groups = -(-inputs // group)
    indices = np.arange(inputs) // group
    if act_order:
        indices = rng.permutation(indices)
    weight = rng.normal(0, 0.05, (outputs, inputs)) if weight is None else weight
    integers, zeros, scales = (np.zeros(s) for s in ((outputs, inputs), *[(groups, outputs)] * 2))
    for number in range(groups):
        block = weight[:, indices == number]
        low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
        scales[number] = np.maximum(high - low, 1e-4) / (2**bits - 1)
        zeros[number] = np.clip(np.round(-low / scales[number]), 1, 2**bits - 1)
        rounding = np.round(block / scales[number][:, None]) + zeros[number][:, None]
        integers[:, indices == number] = np.clip(rounding, 0, 2**bits - 1)
    tensors = {
        "qweight": torch.from_numpy(packed(integers, bits).T.copy()),
        "qzeros": torch.from_numpy(packed(zeros - 1, bits)),
        "scales": torch.from_numpy(scales).to(dtype),
        "g_idx": torch.from_numpy(indices.astype(np.int32)),
    }
    return tensors, weight


def compensated(rng, weight, group, samples=256):
    """What GPTQ makes of a weight for inputs that are correlated: its tensors by last name.

    Column by column, what rounding did to the outputs is made up for in the columns to come (arXiv
    2210.17323), so that weights end steps away from where they were.
    """
    outputs, inputs = weight.shape
    mixing = rng.normal(size=(inputs, inputs)) + 3 * rng.normal(size=(1, inputs))
    seen = rng.normal(size=(samples, inputs)) @ mixing
    hessian = seen.T @ seen
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    tensors, _ = gptq_module(rng, outputs, inputs, group=group, weight=weight)
    scales = tensors["scales"].double().numpy()
    zeros = unpacked(tensors["qzeros"].numpy(), 4, outputs) + 1
    left, integers = weight.astype(np.float64).copy(), np.zeros((outputs, inputs))
    for column in range(inputs):
        scale, zero = scales[column // group], zeros[column // group]
        integers[:, column] = np.clip(np.round(left[:, column] / scale) + zero, 0, 15)
        wrong = (left[:, column] - scale * (integers[:, column] - zero)) / upper[column, column]
        left[:, column:] -= np.outer(wrong, upper[column, column:])
    return tensors | {"qweight": torch.from_numpy(packed(integers, 4).T.copy())}


def gptq_dequantised(tensors, bits):
    """GPTQ's weights [outputs, inputs] in float64, by the layout that AutoGPTQ published."""
    indices = tensors["g_idx"].numpy()
    outputs = tensors["scales"].shape[1]
    integers = unpacked(tensors["qweight"].numpy().T.copy(), bits, len(indices))
    zeros = unpacked(tensors["qzeros"].numpy(), bits, outputs) + 1
    scales = tensors["scales"].double().numpy()
    return scales[indices].T * (integers - zeros[indices].T)


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # llm-awq: bits 4 * k of a word hold the output AWQ_ORDER[k]


def awq_module(rng, outputs, inputs, *, group=8, dtype=torch.float16, weight=None):
    """An AWQ module of random weights: its tensors by last name, and the weights."""
    weight = rng.normal(0, 0.05, (outputs, inputs)) if weight is None else weight
    blocks = weight.reshape(outputs, inputs // group, group)
    low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
    scales = np.maximum(high - low, 1e-4) / 15
    zeros = np.clip(np.round(-low / scales), 0, 15)
    integers = np.clip(np.round(blocks / scales[..., None]) + zeros[..., None], 0, 15)
    tensors = {
        "qweight": torch.from_numpy(_awq_packed(integers.reshape(outputs, inputs).T)),
        "qzeros": torch.from_numpy(_awq_packed(zeros.T)),
        "scales": torch.from_numpy(scales.T.copy()).to(dtype),
    }
    return tensors, weight


def _awq_packed(values):
    """Integers [rows, outputs] as words [rows, outputs / 8]."""
    rows, outputs = values.shape
    ordered = values.reshape(rows, outputs // 8, 8)[:, :, AWQ_ORDER]
    return packed(ordered.reshape(rows, outputs), 4)


def fp8_module(rng, outputs, inputs, *, block=(4, 8), scale_dtype=torch.float32, weight=None):
    """A module of fine-grained FP8 of random weights: its tensors by last name, and the weights."""
    weight = rng.normal(0, 0.05, (outputs, inputs)) if weight is None else weight
    rows, columns = -(-outputs // block[0]), -(-inputs // block[1])
    scales = np.zeros((rows, columns))
    for row, column in np.ndindex(rows, columns):
        part = weight[row * block[0] :, column * block[1] :][: block[0], : block[1]]
        scales[row, column] = np.abs(part).max() / 448
    kept = torch.from_numpy(scales).to(scale_dtype)
    spread = kept.double().numpy().repeat(block[0], 0)[:outputs].repeat(block[1], 1)[:, :inputs]
    values = torch.from_numpy(weight / spread).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": kept}, weight


def named(path, tensors):
    """A module's tensors by their names in a checkpoint."""
    return {f"{path}.{name}": value for name, value in tensors.items()}


def of_module(path, tensors):
    """The other way round."""
    start = f"{path}."
    return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}


def quantised_checkpoint(directory, model, quantise, config):
    """Write a model's checkpoint with all Linear modules but the head quantised.

    Args:
        directory: an existing one.
        model: the float model.
        quantise: weight to tensors by last name.
        config: the `quantization_config`.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            state |= named(path, quantise(state.pop(f"{path}.weight")))
    named_class = {"architectures": [type(model).__name__]}
    save(directory, state, model.config.to_dict() | named_class | {"quantization_config": config})


def save(directory, state, config, metadata=None):
    """Write tensors and the configuration beside them."""
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, directory / "model.safetensors", metadata or {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, default=str))


def read(directory):
    """A checkpoint's layout and tensors."""
    config = json.loads((directory / "config.json").read_text())
    tensors = stored_tensors(directory / "model.safetensors")
    return find_layout(config["quantization_config"], tensors), tensors


def merge_into(base, adapter, directory):
    """Fold an adapter into a quantised checkpoint and write it, all at once and in memory."""
    layout, tensors = read(base)
    state = merged(tensors, quantised_changes(adapter, layout, tensors))
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": dict(layout.settings())}
    save(directory, state, config, file_metadata(base / "model.safetensors"))
