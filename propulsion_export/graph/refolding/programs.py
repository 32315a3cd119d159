"""Fold an adapter into copies of an artifact's graphs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.artifacts.layout import pack
from propulsion_export.artifacts.manifest import Manifest
from propulsion_export.artifacts.tensor_names import MODULES_INPUT, SCALES_INPUT
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import BaseModelError
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.optimise import TRANSPOSED, optimise
from propulsion_export.graph.quantisation.folding import FoldScales, set_values
from propulsion_export.graph.refolding.builder_modules import insert_builder_scales_
from propulsion_export.graph.refolding.heads import resize_labels_
from propulsion_export.graph.refolding.modules import Brought, insert_scales_
from propulsion_export.graph.refolding.unpacking import UnpackInput
from propulsion_export.graph.refolding.weights import FoldWeights
from propulsion_export.graph.slot_plan import parts_of


@dataclass(frozen=True)
class FoldedGraphs:
    """Graphs with an adapter folded in.

    Attributes:
        programs: by file name.
        untied: whether a weight that modules share was copied.
    """

    programs: dict[str, ir.Model]
    untied: bool = False


@dataclass(frozen=True)
class SourceGraphs:
    """The graphs of an artifact, read once for any number of adapters.

    Attributes:
        manifest: of the artifact.
        programs: its graphs by file name; weights stay on disk.
        defaults: the base model's values of the packed inputs, float64; none in a folded artifact.
        skeleton: the base model's class without weights, for a graph of onnxruntime-genai's builder
            without slots, which names its nodes by layer.
    """

    manifest: Manifest
    programs: Mapping[str, ir.Model]
    defaults: Mapping[str, Array]
    skeleton: Any | None = None

    @classmethod
    def read(cls, artifact: Artifact, *, trust_remote_code: bool = False) -> Self:
        """Read the graphs of a switchable artifact, or of one without adapters.

        Raises:
            ArtifactError: a graph cannot be read.
        """
        manifest = artifact.manifest
        names = manifest.graphs or (GRAPH_FILE,)
        feeds = artifact.feeds(BASE_NAME) if manifest.mode == "switchable" else {}
        return cls(
            manifest,
            {name: read_graph(artifact.directory, name) for name in names},
            {name: values.astype(np.float64) for name, values in feeds.items()},
            _skeleton(artifact, trust_remote_code=trust_remote_code),
        )

    def labels_of(self, adapter: Adapter) -> int | None:
        """How many labels the head has with an adapter; None where no head counts labels."""
        if self._room is None:
            return None
        counts = {
            len(values)
            for name, values in adapter.modules.items()
            if self._rows_of(name) == self._room
        }
        return max(counts, default=len(self.manifest.base.labels or ()) or self._room)

    def fold(self, adapter: Adapter, *, untie: bool, signs: bool = False) -> FoldedGraphs:
        """Copies of the graphs with an adapter folded in.

        Weights are multiplied in float64 and rounded once; of quantised ones only the quantisation
        scales change. What does not change stays on disk.

        Args:
            adapter: the adapter.
            untie: copy a weight that the adapter scales and something else reads as well.
            signs: of quantised weights, change the integers where a scale is negative or zero, see
                `quantisation.FoldScales`.

        Raises:
            AdapterError: the graphs have no place for a tensor of the adapter, or a product is too
                large for their dtype.
            BaseModelError: a weight is shared and `untie` is off, or cannot be folded.
        """
        labels = self.labels_of(adapter)
        programs = {name: program.clone() for name, program in self.programs.items()}
        if self.manifest.mode == "switchable":
            brought = self._unpacked(programs, adapter, labels)
        elif self.skeleton is not None:
            program, dtype = programs[GRAPH_FILE], self.manifest.dtype
            brought = insert_builder_scales_(program, self.skeleton, adapter, dtype)
        else:
            brought = insert_scales_(programs, adapter)
        if labels is not None:
            self._resize(programs, brought, labels)
        untied = False
        if self.manifest.quantization is None:
            untied = _fold_weights(programs, brought, untie=untie)
        else:
            for program in programs.values():
                FoldScales(brought.scales, brought.others, signs=signs)(program)
        if self.manifest.exporter == "transformers":
            for program in programs.values():
                optimise(program)
        return FoldedGraphs(programs, untied)

    def _unpacked(
        self, programs: Mapping[str, ir.Model], adapter: Adapter, labels: int | None
    ) -> Brought:
        layout = self.manifest.layout
        feeds = pack(adapter, layout, self.defaults)
        brought = Brought({}, {})
        for program in programs.values():
            for packed, slots in parts_of(layout).items():
                unpacking = UnpackInput(packed, feeds[packed], slots)
                unpacking(program)
                kept = brought.scales if packed == SCALES_INPUT else brought.others
                kept.update(unpacking.parts)
        heads = {slot.path for slot in layout.get(MODULES_INPUT, ())} & brought.others.keys()
        for name in heads:
            brought.others[name] = self._trimmed(name, brought.others[name], adapter, labels)
        return brought

    def _trimmed(self, name: str, values: Array, adapter: Adapter, labels: int | None) -> Array:
        """A saved module's values without the rows that its slot has for other adapters' labels."""
        if name in adapter.modules:
            return values[: len(adapter.modules[name])]
        grows = labels is not None and len(values) == self._room and not values[labels:].any()
        return values[:labels] if grows else values

    def _rows_of(self, name: str) -> int | None:
        """The first axis of a saved module's slot, or of the parameter in a graph without slots."""
        slots = self.manifest.layout.get(MODULES_INPUT, ())
        found = [slot.shape[0] for slot in slots if slot.path == name]
        for program in self.programs.values():
            for stored, axis in ((name, 0), (f"{name}{TRANSPOSED}", -1)):
                value = program.graph.initializers.get(stored)
                if value is not None and value.const_value is not None:
                    found.append(value.const_value.numpy().shape[axis])
        return next(iter(found), None)

    @property
    def _room(self) -> int | None:
        """How many labels the head of the graphs has."""
        name = TASKS[self.manifest.task].labelled_output
        widths = (spec.shape[-1] for spec in self.manifest.outputs if spec.name == name)
        width = next(widths, None)
        return width if isinstance(width, int) else None

    def _resize(self, programs: Mapping[str, ir.Model], brought: Brought, labels: int) -> None:
        """Make the heads as wide as the values that are brought."""
        output = str(TASKS[self.manifest.task].labelled_output)
        for program in programs.values():
            initializers = program.graph.initializers
            for name in brought.others.keys() & initializers.keys():
                set_values(initializers[name], brought.others[name])
            heads = [initializers[name] for name in brought.others.keys() & initializers.keys()]
            resize_labels_(program.graph, output, heads, labels)


def _skeleton(artifact: Artifact, *, trust_remote_code: bool) -> Any | None:
    manifest = artifact.manifest
    if manifest.exporter != "genai" or manifest.mode != "folded":
        return None
    from propulsion_export.base_model.loading import load_empty

    config = read_config(str(artifact.directory), trust_remote_code=trust_remote_code)
    return load_empty(
        config, manifest.task, head={}, labels=None, trust_remote_code=trust_remote_code
    )


def _fold_weights(programs: Mapping[str, ir.Model], brought: Brought, *, untie: bool) -> bool:
    """Fold into weights that are not quantised; whether one of them had to be copied."""
    folds = {name: FoldWeights(brought.scales, brought.others) for name in programs}
    for name, program in programs.items():
        folds[name](program)
    left = sorted({_path(scale) for fold in folds.values() for scale in fold.left})
    if left:
        raise BaseModelError(
            *(f"{path}: found no weight in the graph to fold its scale into" for path in left),
            remedy="Export it with --mode folded from the base model.",
        )
    return _check_shared(programs, folds, untie=untie)


def _check_shared(
    programs: Mapping[str, ir.Model], folds: Mapping[str, FoldWeights], *, untie: bool
) -> bool:
    """Whether a weight was copied that other nodes read too, in its graph or in another.

    Raises:
        BaseModelError: one was, and `untie` is off.
    """
    sizes = {weight: size for fold in folds.values() for weight, size in fold.copied.items()}
    folded = {weight for fold in folds.values() for weight in fold.folded}
    for name, program in programs.items():
        for weight in folded - folds[name].folded:
            kept = program.graph.initializers.get(weight)
            tensor = None if kept is None else kept.const_value
            if tensor is not None and len(tensor.shape) > 1:
                sizes[weight] = tensor.nbytes
    if sizes and not untie:
        raise BaseModelError(
            *(
                f"{weight}: is shared with what the adapter must not change; untying adds "
                f"{size / 2**20:.1f} MiB"
                for weight, size in sizes.items()
            ),
            remedy="Accept that with --untie, or keep the switchable artifact.",
        )
    return bool(sizes)


def _path(scale: str) -> str:
    return scale.partition(".propulsion_")[0].removesuffix("_propulsion_scale")
