"""Map stored tensors to a model's parameters, by transformers' own conversion rules.

transformers renames tensors on loading, and stacks the experts of a mixture, which are stored one
by one, into one parameter. Folding tensor by tensor has to know what each tensor holds. It writes
each under its stored name, which other versions of transformers and other tools can load too.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.tensor_files import StoredTensor
from propulsion_export.scaling.fold.jobs import Part
from propulsion_export.scaling.fold.ties import replace_parameters_

_BLOCK = 1 << 18  # values that are compared at a time


class StoredParts:
    """The stored tensors that each parameter of a model is loaded from.

    Args:
        checkpoint: a checkpoint that transformers can load the model from.
        model: the model; it may be on the meta device.

    Attributes:
        unread: the names of stored tensors that the model has no parameter for.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint, self.model = checkpoint, model
        self._prefix = str(model.base_model_prefix)
        self._state = dict(model.state_dict(keep_vars=True))
        self._ties = _tied_groups(model)
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        # Names of old versions, which transformers reads too; they are written as the new names.
        self._legacy = get_checkpoint_conversion_mapping("legacy")
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        found: dict[str, dict[str | None, list[Part]]] = {}
        self.unread: list[str] = []
        for key in sorted(checkpoint.tensors, key=dot_natural_key):
            read = list(self._read(key))
            if not read:
                self.unread.append(key)
            for part, pattern in read:
                found.setdefault(part.parameter, {}).setdefault(pattern, []).append(part)
        self._parts = {name: self._placed(parts) for name, parts in found.items()}

    def own(self, parameter: str) -> list[Part]:
        """The parts stored under the parameter's own name; empty if there are none."""
        return self._parts.get(parameter, [])

    def of(self, parameter: str) -> list[Part]:
        """The parts stored for a parameter, or else for one that transformers ties it to."""
        for name in (parameter, *self._ties.get(parameter, ())):
            if name == parameter and self.own(name):
                return self.own(name)
            if parts := self.own(name):
                return [replace(part, parameter=parameter, name=parameter) for part in parts]
        return []

    def _read(self, key: str) -> Iterator[tuple[Part, str | None]]:
        """The parts that a stored tensor holds, and the pattern of the converter that applies."""
        modern = apply_renamings(key, self._legacy)
        # A rule may match a name that is already the model's own, so both are tried, as
        # transformers does.
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            plain, pattern = rename_source_key(modern, renamings, converters)
            parameter, _ = rename_source_key(plain, [], [], self._prefix, self._state)
            if parameter in self._state:
                name = self._prefixed(modern, plain, parameter)
                for target in self._targets(parameter, pattern):
                    yield Part(key, target, name), pattern
                return

    def _prefixed(self, key: str, plain: str, parameter: str) -> str:
        """The stored name, with the model's prefix if and only if the parameter has it."""
        if parameter == f"{self._prefix}.{plain}":
            return f"{self._prefix}.{key}"
        return key if parameter == plain else key.removeprefix(f"{self._prefix}.")

    def _targets(self, parameter: str, pattern: str | None) -> list[str]:
        """All parameters that a tensor is converted to; `parameter` is the first of them."""
        if pattern is None:
            return [parameter]
        first, *others = self._converter(pattern).target_patterns
        return [parameter, *(parameter.replace(first, other, 1) for other in others)]

    def _converter(self, pattern: str) -> Any:
        return next(c for c in self._converters if pattern in c.source_patterns)

    def _placed(self, found: dict[str | None, list[Part]]) -> list[Part]:
        """The parts of one parameter, given by converter pattern, with `expert` and `first` set."""
        if None in found:
            return found[None][:1]
        converter = self._converter(str(next(iter(found))))
        if not _stacks_experts(converter):
            return [replace(p, convertible=False) for parts in found.values() for p in parts]
        placed, first = [], 0
        for pattern in converter.source_patterns:
            parts = found.get(pattern, [])
            placed += [replace(p, expert=index, first=first) for index, p in enumerate(parts)]
            first += self.checkpoint.tensors[parts[0].key].shape[0] if parts else 0
        return placed


def untie_as_stored_(parts: StoredParts) -> None:
    """Untie the model's weights that the checkpoint stores separately and with different values.

    transformers does not tie such weights on loading, whatever the configuration says; a model on
    the meta device, built from the configuration alone, has them tied.
    """
    model = parts.model
    for target, source in tied_parameters(model).items():
        stored = [parts.own(name)[:1] for name in (target, source)]
        if all(stored):
            ours, theirs = (parts.checkpoint.tensors[part.key] for (part,) in stored)
            if not same_values(ours, theirs):
                owner, _, attribute = target.rpartition(".")
                weight = model.get_parameter(target).detach().clone()
                replace_parameters_(model.get_submodule(owner), {attribute: weight})


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same values; of either a block is in memory."""
    if one.shape != other.shape:
        return False
    pairs = zip(one.blocks(_BLOCK), other.blocks(_BLOCK), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """The parameter that each tied parameter gets its value from."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _tied_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """For each parameter that is tied, the other parameters tied to it."""
    groups: dict[str, list[str]] = {}
    for target, source in tied_parameters(model).items():
        groups.setdefault(source, [source]).append(target)
    return {
        name: [other for other in group if other != name]
        for group in groups.values()
        for name in group
    }


def _stacks_experts(converter: Any) -> bool:
    """Whether a converter only stacks the experts' matrices, and joins those of one expert."""
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
