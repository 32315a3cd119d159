"""Fold an adapter into a checkpoint on disk, tensor by tensor.

The model is built without weights, for its names, module classes and ties. Tensors are then read,
folded and written one module at a time (experts that are stored one by one, one at a time), so that
memory is bounded by the largest module and not by the checkpoint. Tensors that transformers
converts on loading are written as they were stored.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.model_fingerprint import base_weights, inner_base_model
from propulsion_export.base_model.recomputed import recomputed_parameters
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.fold.model import check_finite, folded_module
from propulsion_export.scaling.fold.shards import ShardWriter, plan_shards
from propulsion_export.scaling.fold.source import Checkpoint
from propulsion_export.scaling.fold.stored import Part, StoredParts
from propulsion_export.scaling.fold.ties import replace_parameters_
from propulsion_export.scaling.layer_rules import narrowed


@dataclass(frozen=True)
class Job:
    """One tensor to write, and the `part` it is stored in; None if it comes from the adapter."""

    name: str
    parameter: str
    part: Part | None


def fold_checkpoint(
    parts: StoredParts,
    adapter: Adapter,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> torch.dtype:
    """Write the folded weights of a checkpoint into `directory`, in shards with an index.

    Args:
        parts: the base model's checkpoint, and the model for the task on the meta device with the
            ties undone that `untie_as_stored_` and `check_untied` undo.
        adapter: the adapter to fold in.
        directory: an existing directory; it gets `model.safetensors`, or shards of at most
            `max_shard_size` bytes.
        dtype: the dtype of all floating-point tensors written; None keeps each as stored.
        max_shard_size: the largest size of a shard, in bytes.

    Returns:
        The floating-point dtype of the weights written, the coarsest if there are several.

    Raises:
        BaseModelError: a parameter is neither in the checkpoint nor in the adapter.
        AdapterError: not one weight changes.
    """
    checkpoint = parts.checkpoint
    jobs = _plan(parts, adapter)
    dtypes = _dtypes_to_write(checkpoint, jobs, dtype)
    shapes = {job.name: _meta(checkpoint, adapter, job) for job in jobs}
    writer = ShardWriter(directory, shapes, dtypes, plan_shards(shapes, dtypes, max_shard_size))
    changed = bool(adapter.modules)
    with writer:
        for group in _by_module(jobs, adapter):
            stored = {job: _stored(checkpoint, adapter, job) for job in group}
            for job, value in _fold(parts.model, stored, adapter, dtype).items():
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
    """The floating-point dtype of the lowest precision."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return min(floating, key=lambda dtype: dtype.itemsize, default=torch.float32)


def fingerprint_of_checkpoint(parts: StoredParts) -> Fingerprint:
    """The fingerprint of a checkpoint's base model; only single entries are read.

    The model of `parts` may be for any task, with or without a head.
    """
    model, weights = parts.model, {}
    for name in base_weights(model):
        found = parts.of(name) or parts.of(f"{model.base_model_prefix}.{name}")
        if len(found) == 1 and found[0].convertible and found[0].expert is None:
            weights[name] = parts.checkpoint.tensors[found[0].key]
    return Fingerprint.of(weights)


def _plan(parts: StoredParts, adapter: Adapter) -> list[Job]:
    """The tensors to write, in the model's order; of tied parameters only the first."""
    checkpoint, model = parts.checkpoint, parts.model
    jobs: dict[str, Job] = {}
    missing, seen = [], set()
    recomputed = recomputed_parameters(model)
    for parameter, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if parameter in adapter.modules:
            jobs[parameter] = Job(parameter, parameter, None)
            continue
        found = parts.of(parameter)
        if not found and _is_needed(parameter, model, adapter, recomputed):
            missing.append(
                f"{checkpoint.source}: {parameter} is neither in the checkpoint nor in the adapter"
            )
        _check_parts(checkpoint, found, tensor, scaled=_is_scaled(parameter, adapter))
        # A stored tensor that holds several parameters is written once.
        jobs |= {part.name: Job(part.name, parameter, part) for part in found}
    if missing:
        raise BaseModelError(
            *missing, remedy="Choose another --task, or train the head with the adapter."
        )
    return list(jobs.values())


def _is_needed(
    parameter: str, model: PreTrainedModel, adapter: Adapter, recomputed: Collection[str]
) -> bool:
    """Whether a parameter that the checkpoint lacks would be missing in what is written."""
    if parameter in recomputed:
        return _is_scaled(parameter, adapter)
    return not _is_absent_pooler(parameter, model, adapter)


def _is_absent_pooler(parameter: str, model: PreTrainedModel, adapter: Adapter) -> bool:
    """Whether it belongs to a pooling layer, which a checkpoint without a head may lack."""
    bare = inner_base_model(model) is model
    return bare and parameter.startswith("pooler.") and not _is_scaled(parameter, adapter)


def _is_scaled(parameter: str, adapter: Adapter) -> bool:
    return parameter in adapter.scales or parameter.rpartition(".")[0] in adapter.scales


def _check_parts(
    checkpoint: Checkpoint, parts: list[Part], parameter: torch.Tensor, *, scaled: bool
) -> None:
    """Refuse parts that do not make the whole parameter, or that a scale cannot be folded into."""
    if not parts:
        return
    key, name = parts[0].key, parts[0].parameter
    if not parts[0].convertible:
        if scaled:
            raise BaseModelError(
                f"{checkpoint.source}: {name} is converted from {key} in a way that cannot be "
                "folded on disk",
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
    """The shape that the parts make together; several if experts differ, in a damaged file."""
    if parts[0].expert is None:
        return [checkpoint.tensors[parts[0].key].shape]
    matrices: dict[int | None, list[tuple[int, ...]]] = {}
    for part in parts:
        shape = checkpoint.tensors[part.key].shape
        matrices.setdefault(part.expert, []).append(shape)
    return [
        (len(matrices), sum(shape[0] for shape in shapes), *inputs)
        for shapes in matrices.values()
        for inputs in {shape[1:] for shape in shapes}
    ]


def _dtypes_to_write(
    checkpoint: Checkpoint, jobs: list[Job], wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of each tensor; the adapter's own parameters get the base model's."""
    stored = {job.name: checkpoint.tensors[job.part.key].dtype for job in jobs if job.part}
    dtypes = {job.name: stored.get(job.name, coarsest(stored.values())) for job in jobs}
    return {
        name: wanted if wanted is not None and dtype.is_floating_point else dtype
        for name, dtype in dtypes.items()
    }


def _meta(checkpoint: Checkpoint, adapter: Adapter, job: Job) -> torch.Tensor:
    """A tensor without values, of the shape that is to be written."""
    part = job.part
    shape = checkpoint.tensors[part.key].shape if part else adapter.modules[job.parameter].shape
    return torch.empty(shape, device="meta")


def _stored(checkpoint: Checkpoint, adapter: Adapter, job: Job) -> torch.Tensor:
    if job.part is None:
        return torch.from_numpy(adapter.modules[job.parameter])
    return checkpoint.tensors[job.part.key].read()


def _by_module(jobs: list[Job], adapter: Adapter) -> list[list[Job]]:
    """The jobs in groups: the parameters of a scaled module together, each other job alone."""
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
    """The folded tensors of one group of jobs; unscaled ones are returned as they are."""
    job = next(iter(stored))
    path, scaled = job.parameter.rpartition(".")[0], job.parameter in adapter.scales
    if scaled and job.part is not None and job.part.expert is not None:
        return {job: _folded_expert(job.parameter, job.part, stored[job], adapter, dtype)}
    if not scaled and path not in adapter.scales:
        return dict(stored)
    module = model.get_submodule(path)
    names = {job.parameter.rpartition(".")[2]: job for job in stored}
    replace_parameters_(module, {name: stored[job] for name, job in names.items()})
    folded = folded_module(module, job.parameter if scaled else path, adapter, dtype)
    # Free the memory.
    replace_parameters_(module, {name: stored[job].to("meta") for name, job in names.items()})
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
