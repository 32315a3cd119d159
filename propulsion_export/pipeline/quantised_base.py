"""A quantised base model: what `merge` does otherwise with one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.manifest import Manifest
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import settings_in
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tensor_files import DTYPES, StoredTensor
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.changes import Computed, Given, all_changes
from propulsion_export.merging.plain_models import Module
from propulsion_export.merging.plan import Plan, coarsest
from propulsion_export.merging.quantised.folding import quantised_changes
from propulsion_export.merging.quantised.layout import Layout
from propulsion_export.merging.quantised.layouts import find_layout, with_plain
from propulsion_export.merging.quantised.modules import Modules, RuleOf
from propulsion_export.merging.quantised.weights import fingerprint_of_quantised

QUANTISATION = "quantization_config"  # in config.json


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
        settings = settings_in(checkpoint.source, "config.json").get(QUANTISATION)
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

    def with_copies(self, ties: Mapping[str, str]) -> "QuantisedBase":
        """The base model with a tensor of its own for each parameter that is no longer tied.

        Args:
            ties: the parameter that each was tied to; one of both is stored, or both are.
        """
        modules = Modules(self.layout, self.checkpoint.tensors)
        pairs = [pair for one, other in ties.items() for pair in ((one, other), (other, one))]
        names = [(modules.parameter(one), modules.parameter(other)) for one, other in pairs]
        stored = self.checkpoint.tensors
        return replace(self, copies={a: b for a, b in names if a not in stored and b in stored})

    def holds(self, modules: Iterable[Module]) -> bool:
        """Whether all of these modules are stored in their shapes, quantised or not."""
        return all(self._shape(module.path) == module.shape for module in modules)

    def plan(self, adapter: Adapter, rule_of: RuleOf) -> Plan:
        """What a merge writes.

        Args:
            adapter: the adapter to fold in.
            rule_of: as in `quantised_changes`.

        Raises:
            AdapterError, BaseModelError: as `quantised_changes` says.
        """
        changes = quantised_changes(adapter, self.layout, self._tensors, rule_of)
        every = all_changes(self._tensors, changes)
        keys = {name: self.copies.get(name, name) for name in every}
        given = any(isinstance(change, Given | Computed) for change in every.values())
        return Plan(adapter.name, self.checkpoint.source, every, keys, given)

    def manifest(self, manifest: Manifest) -> Manifest:
        """The manifest with the dtype of what is not quantised."""
        plain = coarsest(
            stored.dtype
            for name, stored in self.checkpoint.tensors.items()
            if not self.layout.has(name.rpartition(".")[0])
        )
        return replace(manifest, dtype=str(DTYPES[plain]))  # type: ignore[arg-type]

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says of the quantisation of a merged checkpoint."""
        apart = [name.rpartition(".")[0] for name in self.copies]
        return {QUANTISATION: with_plain(self.layout.settings(), apart)}

    def write_settings(self, directory: Path) -> None:
        """Write them into the `config.json` of a merged checkpoint."""
        file = directory / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | self.settings
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _shape(self, path: str) -> tuple[int, ...] | None:
        """The shape of a module's weight."""
        if self.layout.has(path):
            return self.layout.shape(path)
        stored = self.checkpoint.tensors.get(f"{path}.weight")
        return None if stored is None else stored.shape

    @property
    def _tensors(self) -> Mapping[str, StoredTensor]:
        stored = self.checkpoint.tensors
        return {**stored, **{name: stored[source] for name, source in self.copies.items()}}
