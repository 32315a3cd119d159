"""Which stored tensors a model's parameters are made of, by transformers' own conversion rules.

transformers renames tensors on loading, and makes one parameter of the experts of a mixture, which
are stored one by one. A fold that goes tensor by tensor has to know what each of them holds, and
writes it under the name it was stored by, which other versions and tools read too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
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

from propulsion_export.scaling.fold.source import Checkpoint, StoredTensor


@dataclass(frozen=True)
class Part:
    """What one stored tensor holds of a parameter.

    Attributes:
        key: in the checkpoint.
        parameter: of the model.
        name: what to write the tensor as.
        expert: which slice of the parameter's first axis it is; None for the whole parameter.
        first: where it begins on the second axis then, an output channel.
        convertible: whether the above is all there is to it; otherwise only transformers knows how
            the parameter comes about, and the tensor can be copied but not folded.
    """

    key: str
    parameter: str
    name: str
    expert: int | None = None
    first: int = 0
    convertible: bool = True


class StoredParts:
    """A checkpoint as seen from the parameters of a model.

    Args:
        checkpoint: any that transformers loads the model from.
        model: may be on the meta device.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self._prefix = str(model.base_model_prefix)
        self._state = dict(model.state_dict(keep_vars=True))
        self._ties = _tied_groups(model)
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        # transformers reads the names of old versions too; nobody has to write them again.
        self._legacy = get_checkpoint_conversion_mapping("legacy")
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        found: dict[str, dict[str | None, list[Part]]] = {}
        for key in sorted(checkpoint.files, key=dot_natural_key):
            for part, pattern in self._read(key):
                found.setdefault(part.parameter, {}).setdefault(pattern, []).append(part)
        self._parts = {name: self._placed(parts) for name, parts in found.items()}

    def own(self, parameter: str) -> list[Part]:
        """What is stored for this very parameter; empty when nothing is."""
        return self._parts.get(parameter, [])

    def of(self, parameter: str) -> list[Part]:
        """What is stored for this parameter, or else for one that transformers ties it to."""
        for name in (parameter, *self._ties.get(parameter, ())):
            if name == parameter and self.own(name):
                return self.own(name)
            if parts := self.own(name):
                return [replace(part, parameter=parameter, name=parameter) for part in parts]
        return []

    def _read(self, key: str) -> Iterator[tuple[Part, str | None]]:
        """The parts a stored tensor is, and the pattern of the converter it goes through."""
        modern = apply_renamings(key, self._legacy)
        # A name may be the model's own although a rule matches it; transformers tries both, too.
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            plain, pattern = rename_source_key(modern, renamings, converters)
            parameter, _ = rename_source_key(plain, [], [], self._prefix, self._state)
            if parameter in self._state:
                name = self._prefixed(modern, plain, parameter)
                for target in self._targets(parameter, pattern):
                    yield Part(key, target, name), pattern
                return

    def _prefixed(self, key: str, plain: str, parameter: str) -> str:
        """The stored name, with the model's prefix exactly where the parameter has it."""
        if parameter == f"{self._prefix}.{plain}":
            return f"{self._prefix}.{key}"
        return key if parameter == plain else key.removeprefix(f"{self._prefix}.")

    def _targets(self, parameter: str, pattern: str | None) -> list[str]:
        """Every parameter that the tensor becomes; the key was renamed to the first."""
        if pattern is None:
            return [parameter]
        first, *others = self._converter(pattern).target_patterns
        return [parameter, *(parameter.replace(first, other, 1) for other in others)]

    def _converter(self, pattern: str) -> Any:
        return next(c for c in self._converters if pattern in c.source_patterns)

    def _placed(self, found: dict[str | None, list[Part]]) -> list[Part]:
        """The parts of one parameter, by the pattern that led to it, each at its place."""
        if None in found:
            return found[None][:1]
        converter = self._converter(str(next(iter(found))))
        if not _stacks_experts(converter):
            return [replace(p, convertible=False) for parts in found.values() for p in parts]
        placed, first = [], 0
        for pattern in converter.source_patterns:
            parts = found.get(pattern, [])
            placed += [replace(p, expert=index, first=first) for index, p in enumerate(parts)]
            first += self._shape(parts[0])[0] if parts else 0
        return placed

    def _shape(self, part: Part) -> tuple[int, ...]:
        return StoredTensor(self._checkpoint.files[part.key], part.key).shape


def untie_as_stored_(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Give weights their own parameters that the checkpoint holds apart, with different values.

    transformers does not tie those on loading, whatever the configuration says. A model on the
    meta device, made from the configuration alone, cannot know.
    """
    parts = StoredParts(checkpoint, model)
    for target, source in _ties(model).items():
        stored = [parts.own(name)[:1] for name in (target, source)]
        if all(stored):
            ours, theirs = (checkpoint.read(part.key) for (part,) in stored)
            if not torch.equal(ours, theirs):
                owner, _, attribute = target.rpartition(".")
                weight = model.get_parameter(target).detach().clone()
                setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(weight))


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """Where the value of each tied parameter comes from, while it is tied."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _tied_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """By parameter: the others that have its value."""
    groups: dict[str, list[str]] = {}
    for target, source in _ties(model).items():
        groups.setdefault(source, [source]).append(target)
    return {
        name: [other for other in group if other != name]
        for group in groups.values()
        for name in group
    }


def _stacks_experts(converter: Any) -> bool:
    """Whether it stacks matrices to experts and, where there are several, joins their outputs."""
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
