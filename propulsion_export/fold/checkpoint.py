"""Fold an adapter into a checkpoint on disk, tensor by tensor.

The model is built without its weights to learn names, module kinds and ties. Tensors are then read,
folded and written one module at a time, so that memory is bounded by the largest module whatever
the size of the checkpoint.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from propulsion_export.adapter import Adapter
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.fingerprint import Fingerprint
from propulsion_export.fold.memory import folded_module
from propulsion_export.fold.shards import ShardWriter, plan_shards
from propulsion_export.fold.source import Checkpoint, StoredTensor
from propulsion_export.model_fingerprint import base_weights, inner_base_model


def fold_checkpoint(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    adapter: Adapter,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> torch.dtype:
    """Write the folded weights of `checkpoint` into `directory`, in shards with an index.

    Args:
        checkpoint: of the base model.
        model: the model for the task on the meta device; ties that shall be undone are undone.
        adapter: what to fold in.
        directory: exists; gets `model.safetensors`, or shards of at most `max_shard_size` bytes.
        dtype: of all floating-point tensors written; None keeps each as stored.
        max_shard_size: in bytes.

    Returns:
        The floating-point type of the weights written, the coarsest if there are several.

    Raises:
        BaseModelError: a parameter is neither in the checkpoint nor in the adapter.
        AdapterError: not one weight changes.
    """
    names = _names_to_write(model)
    for name in _absent_pooler(checkpoint, model, adapter, names):
        del names[name]
    plan = _plan(checkpoint, model, adapter, names)
    dtypes = _dtypes_to_write(checkpoint, plan, dtype)
    shards = plan_shards(names, dtypes, max_shard_size)
    writer = ShardWriter(directory, names, dtypes, shards)
    changed = bool(adapter.modules)
    with writer:
        for path, parameters in _by_module(names).items():
            stored = {
                name: torch.from_numpy(adapter.modules[name])
                if plan[name] is None
                else checkpoint.read(str(plan[name]))
                for name in parameters
            }
            folded = _fold(model.get_submodule(path), path, stored, adapter, dtype)
            for name, value in folded.items():
                written = value.to(dtypes[name])
                changed |= path in adapter.scales and not torch.equal(
                    written, stored[name].to(written.dtype)
                )
                writer.write(name, written)
    if not changed:
        raise AdapterError(
            f"adapter {adapter.name}: changes no weight of {checkpoint.source}, expected an effect",
            remedy="Is this the trained adapter?",
        )
    return coarsest(dtypes.values())


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating-point type that limits the precision of a model with all of them."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return min(floating, key=lambda dtype: dtype.itemsize, default=torch.float32)


def fingerprint_of_checkpoint(checkpoint: Checkpoint, model: PreTrainedModel) -> Fingerprint:
    """The fingerprint of a checkpoint's base, reading single entries only.

    `model` is the empty model for any task; it tells which weights are the base's.
    """
    weights = {}
    for name in base_weights(model):
        key = checkpoint.key_of(name, model.base_model_prefix)
        if key is not None:
            weights[name] = StoredTensor(checkpoint.files[key], key)
    return Fingerprint.of(weights)


def _names_to_write(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every persistent tensor once; of tied ones only the first."""
    seen: set[int] = set()
    names: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            names[name] = tensor
    return names


def _plan(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    adapter: Adapter,
    names: Mapping[str, torch.Tensor],
) -> dict[str, str | None]:
    """The checkpoint's key for every tensor; None where the adapter brings it."""
    plan: dict[str, str | None] = {}
    missing = []
    tied = _ties(model)
    for name, tensor in names.items():
        key = checkpoint.key_of(name, model.base_model_prefix)
        if key is None and name in tied:
            key = checkpoint.key_of(tied[name], model.base_model_prefix)
        plan[name] = None if name in adapter.modules else key
        if key is None and name not in adapter.modules:
            missing.append(
                f"{checkpoint.source}: {name} is neither in the checkpoint nor in the adapter"
            )
        elif plan[name] is not None:
            _check_shape(checkpoint, str(key), tensor)
    if missing:
        raise BaseModelError(
            *missing, remedy="Choose another --task, or train the head with the adapter."
        )
    return plan


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """Where a tied parameter, no longer shared, has its value from."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _check_shape(checkpoint: Checkpoint, key: str, tensor: torch.Tensor) -> None:
    shape = StoredTensor(checkpoint.files[key], key).shape
    if list(shape) != list(tensor.shape):
        raise BaseModelError(
            f"{checkpoint.source}: {key} has shape {list(shape)}, expected {list(tensor.shape)} by "
            "its config.json"
        )


def _dtypes_to_write(
    checkpoint: Checkpoint,
    plan: Mapping[str, str | None],
    wanted: torch.dtype | None,
) -> dict[str, torch.dtype]:
    """By name. What the adapter brings takes the base's type, not the one it was trained in."""
    stored = {
        name: StoredTensor(checkpoint.files[key], key).dtype for name, key in plan.items() if key
    }
    dtypes = {name: stored.get(name, coarsest(stored.values())) for name in plan}
    return {
        name: wanted if wanted is not None and dtype.is_floating_point else dtype
        for name, dtype in dtypes.items()
    }


def _absent_pooler(
    checkpoint: Checkpoint, model: PreTrainedModel, adapter: Adapter, names: Mapping[str, Any]
) -> list[str]:
    """A pooling layer that the checkpoint of a model without a head does not have."""
    if inner_base_model(model) is not model:
        return []
    return [
        name
        for name in names
        if name.startswith("pooler.")
        and name.rpartition(".")[0] not in adapter.scales
        and name not in adapter.modules
        and checkpoint.key_of(name, str(model.base_model_prefix)) is None
    ]


def _by_module(names: Mapping[str, Any]) -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return modules


def _fold(
    module: nn.Module,
    path: str,
    stored: Mapping[str, torch.Tensor],
    adapter: Adapter,
    dtype: torch.dtype | None,
) -> Mapping[str, torch.Tensor]:
    if path not in adapter.scales:
        return stored
    for name, value in stored.items():
        setattr(module, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
    folded = folded_module(module, path, adapter, dtype)
    for name, value in stored.items():  # give the memory back
        setattr(
            module, name.rpartition(".")[2], nn.Parameter(value.to("meta"), requires_grad=False)
        )
    return {**stored, **{f"{path}.{name}": value for name, value in folded.items()}}
