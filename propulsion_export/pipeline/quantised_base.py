"""A quantised base model: what `merge` does otherwise with one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import settings_in
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tensor_files import StoredTensor
from propulsion_export.errors import BaseModelError, UsageError
from propulsion_export.merging.changes import Given, all_changes
from propulsion_export.merging.plan import Plan, coarsest
from propulsion_export.merging.quantised.folding import quantised_changes
from propulsion_export.merging.quantised.layout import Layout
from propulsion_export.merging.quantised.layouts import find_layout, with_plain
from propulsion_export.merging.quantised.modules import Modules, PlainRule
from propulsion_export.merging.quantised.weights import fingerprint_of_quantised
from propulsion_export.scaling.layer_rules import adds_one, check_foldable, layer_kind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SETTINGS = "quantization_config"


def quantised_base(
    checkpoint: Checkpoint, config: "PretrainedConfig", dtype: str
) -> "QuantisedBase | None":
    """The quantised base model that a checkpoint is; None if it is not quantised.

    Args:
        checkpoint: where its tensors are stored.
        config: its configuration, which no longer says so afterwards: models made of it are float.
        dtype: the dtype that is to be written; `keep` is the only one.

    Raises:
        BaseModelError: its layout is not known, or cannot be merged into.
        UsageError: another dtype is asked for.
    """
    base = QuantisedBase.find(checkpoint)
    if base is not None and dtype != "keep":
        raise UsageError(
            f"--dtype {dtype}: {checkpoint.source} is quantised, expected --dtype keep"
        )
    if hasattr(config, _SETTINGS):
        del config.quantization_config
    return base


@dataclass(frozen=True)
class QuantisedBase:
    """A checkpoint whose linear layers are quantised.

    Attributes:
        checkpoint: where its tensors are stored.
        layout: how its quantised modules are stored.
        copies: a stored parameter's name by the name of one that was tied to it and is untied.
    """

    checkpoint: Checkpoint
    layout: Layout
    copies: Mapping[str, str]

    @classmethod
    def find(cls, checkpoint: Checkpoint) -> "QuantisedBase | None":
        """The quantised base model that a checkpoint is; None if its config.json names no method.

        Raises:
            BaseModelError: its layout is not known, or cannot be merged into.
        """
        settings = settings_in(checkpoint.source, "config.json").get(_SETTINGS)
        if not settings:
            return None
        try:
            return cls(checkpoint, find_layout(settings, checkpoint.tensors), {})
        except BaseModelError as error:
            findings = (f"{checkpoint.source}: {finding}" for finding in error.findings)
            raise BaseModelError(*findings, remedy=error.remedy) from error

    def fingerprint(self, recorded: Fingerprint | None) -> Fingerprint:
        """Of the weights as they were before they were quantised, within the steps of the grids."""
        return fingerprint_of_quantised(self.layout, self.checkpoint.tensors, recorded)

    def untied(self, model: "PreTrainedModel", ties: Mapping[str, str]) -> "QuantisedBase":
        """The base model with a tensor for each parameter of `ties` that `model` no longer ties."""
        modules = Modules(self.layout, self.checkpoint.tensors)
        apart = {
            target: source
            for target, source in ties.items()
            if model.get_parameter(target) is not model.get_parameter(source)
        }
        pairs = [pair for one, other in apart.items() for pair in ((one, other), (other, one))]
        names = [tuple(map(modules.parameter, pair)) for pair in pairs]
        stored = self.checkpoint.tensors
        copies = {a: b for a, b in names if a not in stored and b in stored}
        return replace(self, copies=copies)

    def plan(self, adapter: Adapter, model: "PreTrainedModel") -> Plan:
        """What a merge writes.

        Args:
            adapter: the adapter to fold in, which fits the model.
            model: the model without weights; only asked where shapes leave a doubt.

        Raises:
            AdapterError, BaseModelError: as `quantised_changes` says.
        """
        found = quantised_changes(
            adapter, self.layout, self._tensors, lambda path: _rule(model, path)
        )
        changes = all_changes(self._tensors, found)
        keys = {name: self.copies.get(name, name) for name in changes}
        given = any(isinstance(change, Given) for change in found.values())
        return Plan(adapter.name, self.checkpoint.source, changes, keys, given)

    @property
    def dtype(self) -> str:
        """The format's name of the dtype of what is not quantised."""
        return coarsest(
            stored.dtype
            for name, stored in self.checkpoint.tensors.items()
            if not self.layout.has(name.rpartition(".")[0])
        )

    def write_settings(self, directory: Path) -> None:
        """Write how the weights are quantised into the `config.json` of a merged checkpoint."""
        file = directory / "config.json"
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        apart = [name.rpartition(".")[0] for name in self.copies]
        content[_SETTINGS] = with_plain(self.layout.settings(), apart)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def _tensors(self) -> Mapping[str, StoredTensor]:
        stored = self.checkpoint.tensors
        return {**stored, **{name: stored[source] for name, source in self.copies.items()}}


def _rule(model: "PreTrainedModel", path: str) -> PlainRule | None:
    """How a scale lies over the weight of a module that is not quantised."""
    module = model.get_submodule(path)
    check_foldable(module)
    match layer_kind(module):
        case "linear":
            return "rows"
        case "conv1d" | "embedding":
            return "columns"
        case "norm":
            return "norm plus one" if adds_one(module) else "norm"
    return None
