"""List what a merge writes for a model: which stored tensors, and how each is scaled.

The model is built without weights, for its names, module classes and ties. Tensors that
transformers converts on loading are listed as they are stored.
"""

from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.checkpoint import Checkpoint, Entries
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.model_fingerprint import base_weights, inner_base_model
from propulsion_export.base_model.recomputed import recomputed_parameters
from propulsion_export.errors import BaseModelError
from propulsion_export.scaling.fold.jobs import Job, Part, Rule
from propulsion_export.scaling.fold.stored import StoredParts
from propulsion_export.scaling.layer_rules import adds_one, check_foldable, layer_kind


def fingerprint_of_checkpoint(parts: StoredParts) -> Fingerprint:
    """The fingerprint of a checkpoint's base model; only single entries are read.

    The model of `parts` may be for any task, with or without a head.
    """
    model, weights = parts.model, {}
    for name in base_weights(model):
        found = parts.of(name) or parts.of(f"{model.base_model_prefix}.{name}")
        if len(found) == 1 and found[0].convertible and found[0].expert is None:
            weights[name] = Entries(parts.checkpoint.tensors[found[0].key])
    return Fingerprint.of(weights)


def jobs_of(parts: StoredParts, adapter: Adapter) -> list[Job]:
    """The tensors to write, in the model's order; of tied parameters only the first.

    Args:
        parts: the base model's checkpoint, and the model for the task on the meta device with the
            ties undone that `untie_as_stored_` and `check_untied` undo.
        adapter: the adapter to fold in, which fits the model.

    Raises:
        BaseModelError: a parameter is neither in the checkpoint nor in the adapter, has another
            shape than the model's, or cannot be scaled exactly.
    """
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
        rule = _rule(model, parameter, adapter)
        for part in found:
            own = "expert" if rule and part.expert is not None else rule
            jobs[part.name] = Job(part.name, parameter, part, own)
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


def _rule(model: PreTrainedModel, parameter: str, adapter: Adapter) -> Rule | None:
    """How a parameter is scaled; None if it is not."""
    path, _, name = parameter.rpartition(".")
    if parameter in adapter.scales:
        transposed = model.get_submodule(path).is_transposed
        return "experts' columns" if transposed else "experts' rows"
    if path not in adapter.scales or name not in ("weight", "bias"):
        return None
    side = adapter.scales[path].side
    if name == "bias":
        return "bias" if side == "output" else "trained bias" if path in adapter.biases else None
    module = model.get_submodule(path)
    check_foldable(module)
    kind = layer_kind(module)
    if kind == "norm":
        return "norm plus one" if adds_one(module) else "norm"
    # Conv1D and embeddings keep the outputs in the last axis, nn.Linear the inputs.
    return "rows" if (kind == "linear") == (side == "output") else "columns"
