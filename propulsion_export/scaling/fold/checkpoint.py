"""Fold an adapter into a checkpoint on disk, tensor by tensor.

The model is built without its weights to learn names, module kinds and ties. Tensors are then read,
folded and written one module at a time, experts that are stored one by one each by itself, so that
memory is bounded by the largest module whatever the size of the checkpoint. What transformers
converts on loading is written as it was stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.model_fingerprint import base_weights, inner_base_model
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.fold.model import check_finite, folded_module
from propulsion_export.scaling.fold.shards import ShardWriter, plan_shards
from propulsion_export.scaling.fold.source import Checkpoint, StoredTensor
from propulsion_export.scaling.fold.stored import Part, StoredParts
from propulsion_export.scaling.layer_rules import narrowed


@dataclass(frozen=True)
class Job:
    """One tensor to write: the stored `part` of a parameter, or (None) what the adapter brings."""

    name: str
    parameter: str
    part: Part | None


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
    jobs = _plan(checkpoint, model, adapter)
    dtypes = _dtypes_to_write(checkpoint, jobs, dtype)
    shapes = {job.name: _meta(checkpoint, adapter, job) for job in jobs}
    writer = ShardWriter(directory, shapes, dtypes, plan_shards(shapes, dtypes, max_shard_size))
    changed = bool(adapter.modules)
    with writer:
        for group in _by_module(jobs, adapter):
            stored = {job: _stored(checkpoint, adapter, job) for job in group}
            for job, value in _fold(model, stored, adapter, dtype).items():
                written = value.to(dtypes[job.name])
                changed |= job.parameter not in adapter.modules and not torch.equal(
                    written, stored[job].to(written.dtype)
                )
                writer.write(job.name, written)
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
    parts = StoredParts(checkpoint, model)
    weights = {}
    for name in base_weights(model):
        found = parts.of(name) or parts.of(f"{model.base_model_prefix}.{name}")
        if len(found) == 1 and found[0].convertible and found[0].expert is None:
            weights[name] = _on_disk(checkpoint, found[0].key)
    return Fingerprint.of(weights)


def _plan(checkpoint: Checkpoint, model: PreTrainedModel, adapter: Adapter) -> list[Job]:
    """What to write, in the model's order: every persistent tensor once, of tied ones the first."""
    parts = StoredParts(checkpoint, model)
    jobs: dict[str, Job] = {}
    missing, seen = [], set()
    for parameter, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if parameter in adapter.modules:
            jobs[parameter] = Job(parameter, parameter, None)
            continue
        found = parts.of(parameter)
        if not found and not _is_absent_pooler(parameter, model, adapter):
            missing.append(
                f"{checkpoint.source}: {parameter} is neither in the checkpoint nor in the adapter"
            )
        _check_parts(checkpoint, found, tensor, scaled=_is_scaled(parameter, adapter))
        # A tensor that becomes several parameters is written once.
        jobs |= {part.name: Job(part.name, parameter, part) for part in found}
    if missing:
        raise BaseModelError(
            *missing, remedy="Choose another --task, or train the head with the adapter."
        )
    return list(jobs.values())


def _is_absent_pooler(parameter: str, model: PreTrainedModel, adapter: Adapter) -> bool:
    """Whether the checkpoint of a model without a head may lack it: a pooling layer."""
    bare = inner_base_model(model) is model
    return bare and parameter.startswith("pooler.") and not _is_scaled(parameter, adapter)


def _is_scaled(parameter: str, adapter: Adapter) -> bool:
    return parameter in adapter.scales or parameter.rpartition(".")[0] in adapter.scales


def _check_parts(
    checkpoint: Checkpoint, parts: list[Part], parameter: torch.Tensor, *, scaled: bool
) -> None:
    """Refuse what is not the whole parameter, or does not say where in it the scale acts."""
    if not parts:
        return
    key, name = parts[0].key, parts[0].parameter
    if not parts[0].convertible:
        if scaled:
            raise BaseModelError(
                f"{checkpoint.source}: {name} is made from {key} in a way this tool cannot fold on "
                "disk",
                remedy="Save the base model with save_pretrained(…, save_original_format=False).",
            )
        return
    for shape in _whole_shapes(checkpoint, parts):
        if shape != tuple(parameter.shape):
            raise BaseModelError(
                f"{checkpoint.source}: {key} has shape {list(shape)}, expected "
                f"{list(parameter.shape)} by its config.json"
            )


def _whole_shapes(checkpoint: Checkpoint, parts: list[Part]) -> list[tuple[int, ...]]:
    """The shape of what the parts make together; by expert, who may differ if one is damaged."""
    if parts[0].expert is None:
        return [_on_disk(checkpoint, parts[0].key).shape]
    matrices: dict[int | None, list[tuple[int, ...]]] = {}
    for part in parts:
        shape = _on_disk(checkpoint, part.key).shape
        matrices.setdefault(part.expert, []).append(shape)
    return [
        (len(matrices), sum(shape[0] for shape in shapes), *inputs)
        for shapes in matrices.values()
        for inputs in {shape[1:] for shape in shapes}
    ]


def _dtypes_to_write(
    checkpoint: Checkpoint, jobs: list[Job], wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """By name. What the adapter brings takes the base's type, not the one it was trained in."""
    stored = {job.name: _on_disk(checkpoint, job.part.key).dtype for job in jobs if job.part}
    dtypes = {job.name: stored.get(job.name, coarsest(stored.values())) for job in jobs}
    return {
        name: wanted if wanted is not None and dtype.is_floating_point else dtype
        for name, dtype in dtypes.items()
    }


def _meta(checkpoint: Checkpoint, adapter: Adapter, job: Job) -> torch.Tensor:
    """The shape of what is to be written, as a tensor without values."""
    part = job.part
    shape = _on_disk(checkpoint, part.key).shape if part else adapter.modules[job.parameter].shape
    return torch.empty(shape, device="meta")


def _on_disk(checkpoint: Checkpoint, key: str) -> StoredTensor:
    return StoredTensor(checkpoint.files[key], key)


def _stored(checkpoint: Checkpoint, adapter: Adapter, job: Job) -> torch.Tensor:
    if job.part is None:
        return torch.from_numpy(adapter.modules[job.parameter])
    return checkpoint.read(job.part.key)


def _by_module(jobs: list[Job], adapter: Adapter) -> list[list[Job]]:
    """Jobs to be done together: the parameters of a scaled module; every other is by itself."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        path = job.parameter.rpartition(".")[0]
        groups.setdefault(path if path in adapter.scales else f"{job.name} alone", []).append(job)
    return list(groups.values())


def _fold(
    model: PreTrainedModel,
    stored: Mapping[Job, torch.Tensor],
    adapter: Adapter,
    dtype: torch.dtype | None,
) -> dict[Job, torch.Tensor]:
    """What becomes of the stored tensors of one group."""
    job = next(iter(stored))
    path, scaled = job.parameter.rpartition(".")[0], job.parameter in adapter.scales
    if scaled and job.part is not None and job.part.expert is not None:
        return {job: _folded_expert(job.parameter, job.part, stored[job], adapter, dtype)}
    if not scaled and path not in adapter.scales:
        return dict(stored)
    module = model.get_submodule(path)
    names = {job.parameter.rpartition(".")[2]: job for job in stored}
    for name, job in names.items():
        setattr(module, name, nn.Parameter(stored[job], requires_grad=False))
    folded = folded_module(module, job.parameter if scaled else path, adapter, dtype)
    for name, job in names.items():  # give the memory back
        empty = nn.Parameter(stored[job].to("meta"), requires_grad=False)
        setattr(module, name, empty)
    return {job: folded.get(name, stored[job]) for name, job in names.items()}


def _folded_expert(
    path: str, part: Part, value: torch.Tensor, adapter: Adapter, dtype: torch.dtype | None
) -> torch.Tensor:
    """One expert's matrix [outputs, inputs], or some of its outputs, times its scale."""
    rows = slice(part.first, part.first + value.shape[0])
    scale = torch.from_numpy(adapter.scales[path].values[part.expert, rows])
    folded = narrowed(value.double() * scale[:, None], dtype or value.dtype)
    check_finite(path, {part.key: folded})
    return folded
