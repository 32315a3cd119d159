"""What an adapter changes in a quantised checkpoint, by the names and shapes of its tensors alone.

No model is built: a module is quantised if the layout says so, and else a plain Linear layer or an
embedding, which its shape and the adapter's width tell apart.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, Array, StoredTensor
from propulsion_export.errors import AdapterError
from propulsion_export.merging.changes import Change, Given, Scaled, StoredChange
from propulsion_export.merging.quantised.activations import refuse_static_quantisers
from propulsion_export.merging.quantised.layout import Layout
from propulsion_export.merging.quantised.modules import (
    Modules,
    RuleOf,
    is_floating,
    plain_change,
)

_REMEDY = "Was the adapter trained on this base model?"


def quantised_changes(
    adapter: Adapter,
    layout: Layout,
    tensors: Mapping[str, StoredTensor],
    rule_of: RuleOf | None = None,
) -> dict[str, StoredChange]:
    """What becomes of the tensors of a quantised checkpoint when an adapter is folded in.

    By arXiv 2409.10927 the bias is inside the product: (x W^T + b) * s = x (diag(s) W)^T + s * b.

    Args:
        adapter: its scales multiply outputs.
        layout: how the checkpoint stores its quantised modules.
        tensors: the checkpoint's tensors by name.
        rule_of: what says how a scale lies over the weight of a module that is not quantised, by
            the adapter's path; asked only where the shape does not say it. None: such modules are
            refused.

    Returns:
        A change for each tensor that changes, by its name; `changes.all_changes` copies the others.

    Raises:
        AdapterError: a scale or bias has no module here or another width; a product leaves its
            dtype's range; nothing changes.
        BaseModelError: a fold has no exact form in this checkpoint.
    """
    _refuse_inputs_and_experts(adapter)
    folding = _Folding(adapter, Modules(layout, tensors), rule_of)
    folding.check()
    changes = folding.changes()
    if not changes:
        raise AdapterError(
            f"adapter {adapter.name}: changes no weight of the base model, expected an effect",
            remedy="Is this the trained adapter?",
        )
    return changes


def _refuse_inputs_and_experts(adapter: Adapter) -> None:
    refused = [
        f"{path}: scales {'an input' if scale.side == 'input' else 'weights of experts'}, which "
        "cannot be folded into a quantised checkpoint"
        for path, scale in adapter.scales.items()
        if scale.side == "input" or scale.values.ndim != 1
    ]
    if refused:
        raise AdapterError(*refused, remedy="Merge into the checkpoint that is not quantised.")


@dataclass(frozen=True)
class _Folding:
    """An adapter and the modules that it is folded into."""

    adapter: Adapter
    modules: Modules
    rule_of: RuleOf | None

    def check(self) -> None:
        """Refuse, all at once, what has no module in the checkpoint or another width."""
        found = [f"adapter {self.adapter.name}: {misfit}" for misfit in self._misfits()]
        if found:
            raise AdapterError(*found, remedy=_REMEDY)
        scaled = {self.modules.stored(path) for path in self._scales}
        refuse_static_quantisers(self.modules.tensors, scaled)

    def changes(self) -> dict[str, StoredChange]:
        """A change for each tensor that changes, by its name."""
        changes: dict[str, StoredChange] = {}
        for each in (self._quantised(), self._plain(), self._biases(), self._saved()):
            for some in each:
                changes |= some
        return changes

    @property
    def _scales(self) -> dict[str, Array]:
        """The scales that are not all ones, by the adapter's path."""
        scales = self.adapter.scales
        return {path: s.values for path, s in scales.items() if (s.values != 1).any()}

    def _misfits(self) -> Iterator[str]:
        for path, scale in self.adapter.scales.items():
            yield from self.modules.misfits(path, scale.values)
        for path, bias in self.adapter.biases.items():
            yield from _bias_misfits(path, bias, self._stored(f"{path}.bias"))
        for name, values in self.adapter.modules.items():
            yield from _saved_misfits(name, values, self._stored(name))

    def _quantised(self) -> Iterator[Mapping[str, StoredChange]]:
        layout = self.modules.layout
        scales = {self.modules.stored(path): scale for path, scale in self._scales.items()}
        for path in self.modules.quantised:
            has_scale = path in scales
            yield layout.scaled(path, scales[path]) if has_scale else layout.unscaled(path)

    def _plain(self) -> Iterator[Mapping[str, Change]]:
        for own, scale in self._scales.items():
            path = self.modules.stored(own)
            if not self.modules.layout.has(path):
                name = f"{path}.weight"
                stored = self.modules.tensors[name]
                yield {name: plain_change(own, stored, scale, self.rule_of)}

    def _biases(self) -> Iterator[Mapping[str, Change]]:
        for path in {**self._scales, **self.adapter.biases}:
            name = self.modules.parameter(f"{path}.bias")
            stored = self.modules.tensors.get(name)
            scale, trained = self._scales.get(path), self.adapter.biases.get(path)
            if stored is not None and trained is not None:
                yield {name: _given(name, trained * (1.0 if scale is None else scale), stored)}
            elif stored is not None and scale is not None:
                yield {name: Scaled(stored, scale)}

    def _saved(self) -> Iterator[Mapping[str, Change]]:
        for own, values in self.adapter.modules.items():
            name = self.modules.parameter(own)
            yield {name: _given(name, values, self.modules.tensors[name])}

    def _stored(self, name: str) -> StoredTensor | None:
        return self.modules.tensors.get(self.modules.parameter(name))


def _bias_misfits(path: str, bias: Array, stored: StoredTensor | None) -> Iterator[str]:
    if stored is None:
        yield f"{path}: the adapter has a trained bias, the layer has none"
    elif stored.shape != bias.shape:
        yield f"{path}: the adapter has a bias {list(bias.shape)}, the model {list(stored.shape)}"


def _saved_misfits(name: str, values: Array, stored: StoredTensor | None) -> Iterator[str]:
    if stored is None or stored.shape != values.shape or not is_floating(stored):
        found = "no such tensor" if stored is None else f"{stored.dtype} {list(stored.shape)}"
        yield (
            f"{name}: was trained whole with shape {list(values.shape)}, the quantised checkpoint "
            f"has {found}"
        )


def _given(name: str, values: Array, stored: StoredTensor) -> Given:
    """Values as the stored tensor's dtype, rounded once."""
    narrow = rounded(values.astype(np.float64), DTYPES[stored.dtype])
    if not np.isfinite(narrow.astype(np.float64)).all():
        raise AdapterError(f"{name}: would hold values too large for {stored.dtype}")
    return Given(narrow)
