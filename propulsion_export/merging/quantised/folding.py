"""What an adapter changes in a quantised checkpoint, by the names and shapes of its tensors alone.

No model is built: a module is quantised if the layout says so, and else a plain Linear layer or an
embedding, which its shape and the adapter's width tell apart.
"""

from collections.abc import Mapping

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, Array, StoredTensor
from propulsion_export.errors import AdapterError
from propulsion_export.merging.changes import Change, Given, Scaled
from propulsion_export.merging.quantised.activations import refuse_static_quantisers
from propulsion_export.merging.quantised.layout import Layout
from propulsion_export.merging.quantised.modules import Modules, is_floating, plain_factors

_REMEDY = "Was the adapter trained on this base model?"


def quantised_changes(
    adapter: Adapter, layout: Layout, tensors: Mapping[str, StoredTensor]
) -> dict[str, Change]:
    """What becomes of the tensors of a quantised checkpoint when an adapter is folded in.

    Args:
        adapter: its scales multiply outputs.
        layout: how the checkpoint stores its quantised modules.
        tensors: the checkpoint's tensors by name.

    Returns:
        A change for each tensor that changes, by its name; every other is copied.

    Raises:
        AdapterError: a scale or bias has no module here or another width; a product leaves its
            dtype's range; nothing changes.
        BaseModelError: a fold has no exact form in this checkpoint.
    """
    modules = Modules(layout, tensors)
    scales = {modules.stored(path): scale for path, scale in _outputs(adapter).items()}
    biases = {modules.stored(path): bias for path, bias in adapter.biases.items()}
    _check_fits(adapter, modules, scales, biases)
    refuse_static_quantisers(tensors, scales)
    changes: dict[str, Change] = {}
    for path in modules.quantised:
        has_scale = path in scales and not _is_one(scales[path])
        changes |= layout.scaled(path, scales[path].values) if has_scale else layout.unscaled(path)
    for path in scales.keys() - set(modules.quantised):
        changes |= _scaled_plain(modules, path, scales[path])
    for path in [*scales, *(biases.keys() - scales.keys())]:
        changes |= _bias(tensors, path, scales.get(path), biases.get(path))
    for name, values in adapter.modules.items():
        changes[name] = Given(rounded(values.astype(np.float64), DTYPES[tensors[name].dtype]))
    if not changes:
        raise AdapterError(
            f"adapter {adapter.name}: changes no weight of the base model, expected an effect",
            remedy="Is this the trained adapter?",
        )
    return changes


def _outputs(adapter: Adapter) -> Mapping[str, Scale]:
    """The adapter's scales.

    Raises:
        AdapterError: one multiplies a module's input, or the weights of a mixture's experts.
    """
    refused = [
        f"{path}: scales {'an input' if scale.side == 'input' else 'weights of experts'}, which "
        "cannot be folded into a quantised checkpoint"
        for path, scale in adapter.scales.items()
        if scale.side == "input" or scale.values.ndim != 1
    ]
    if refused:
        raise AdapterError(*refused, remedy="Merge into the checkpoint that is not quantised.")
    return adapter.scales


def _check_fits(
    adapter: Adapter,
    modules: Modules,
    scales: Mapping[str, Scale],
    biases: Mapping[str, Array],
) -> None:
    """Refuse, all at once, what has no module in the checkpoint or another width."""
    misfits = [
        *(modules.misfit(path, scale.values) for path, scale in scales.items()),
        *(_bias_misfit(modules.tensors, path, bias) for path, bias in biases.items()),
        *(_saved_misfit(modules.tensors, name, v) for name, v in adapter.modules.items()),
    ]
    found = [f"adapter {adapter.name}: {misfit}" for misfit in misfits if misfit]
    if found:
        raise AdapterError(*found, remedy=_REMEDY)


def _bias_misfit(tensors: Mapping[str, StoredTensor], path: str, bias: Array) -> str | None:
    stored = tensors.get(f"{path}.bias")
    if stored is None:
        return f"{path}: the adapter has a trained bias, the layer has none"
    if stored.shape == bias.shape:
        return None
    return f"{path}: the adapter has a bias {list(bias.shape)}, the model {list(stored.shape)}"


def _saved_misfit(tensors: Mapping[str, StoredTensor], name: str, values: Array) -> str | None:
    stored = tensors.get(name)
    if stored is None:
        return f"{name}: was trained whole, the quantised checkpoint has no such tensor"
    if stored.shape != values.shape or not is_floating(stored):
        return (
            f"{name}: was trained whole with shape {list(values.shape)}, the quantised checkpoint "
            f"has {stored.dtype} {list(stored.shape)}"
        )
    return None


def _scaled_plain(modules: Modules, path: str, scale: Scale) -> Mapping[str, Change]:
    """The change of a weight that is not quantised."""
    name = f"{path}.weight"
    stored = modules.tensors[name]
    return (
        {} if _is_one(scale) else {name: Scaled(stored, plain_factors(path, stored, scale.values))}
    )


def _bias(
    tensors: Mapping[str, StoredTensor], path: str, scale: Scale | None, trained: Array | None
) -> Mapping[str, Change]:
    """The change of a module's bias; the scale multiplies it, or the trained one in its place."""
    name = f"{path}.bias"
    stored = tensors.get(name)
    if stored is None:
        return {}
    if trained is not None:
        factors = 1.0 if scale is None else scale.values
        return {name: Given(rounded(trained.astype(np.float64) * factors, DTYPES[stored.dtype]))}
    return {} if scale is None or _is_one(scale) else {name: Scaled(stored, scale.values)}


def _is_one(scale: Scale) -> bool:
    return bool((scale.values == 1).all())
