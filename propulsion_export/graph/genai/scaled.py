"""Put the slots of a layout into a builder's graph: a Mul for each node that modules share."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array, Scale
from propulsion_export.artifacts.layout import Layout
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.rounding import numpy_dtype
from propulsion_export.artifacts.tensor_names import BIASES_INPUT, MODULES_INPUT, SCALES_INPUT
from propulsion_export.errors import AdapterError
from propulsion_export.graph.genai.architectures import REMEDY
from propulsion_export.graph.genai.editing import scale_input_
from propulsion_export.graph.genai.nodes import Nodes, Place
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.slot_plan import slot_name
from propulsion_export.scaling.layer_rules import output_width

# Where the operators of norms have their bias.
_NORM_BIAS = {"LayerNormalization": 2, "SkipLayerNormalization": 3}


@dataclass(frozen=True)
class _Part:
    """The part of a slot that one node computes; `offset` is where it is in the packed input."""

    place: Place
    slot: Slot
    offset: int


def insert_slots_(nodes: Nodes, layout: Layout, dtype: str) -> Layout:
    """Multiply by an initializer of ones, or add one of zeros, wherever the layout has a slot.

    A scale goes behind the module's bias, as in training. Modules that the graph computes in one
    node have one initializer together, and one that it computes in two nodes has two.

    Args:
        nodes: of the graph, which is changed.
        layout: of the packed inputs; the slots of modules that share a node are one behind the
            other, see `neighbours`.
        dtype: of the initializers.

    Returns:
        The layout with one slot for each initializer; the packed inputs are the same.

    Raises:
        AdapterError: a slot has no node; all of them are named, and nothing is changed.
    """
    _check_possible(nodes, layout)
    found: dict[str, tuple[Slot, ...]] = {}
    for packed, act in ((BIASES_INPUT, _add_), (SCALES_INPUT, _multiply_)):
        slots = []
        for parts in _by_node(nodes, layout.get(packed, ())):
            slots.append(slot := _joined(parts))
            values = np.full(slot.length, packed == SCALES_INPUT, numpy_dtype(dtype))
            act(nodes, parts[0], _initializer(nodes.graph, slot_name(packed, slot), values))
        found[packed] = tuple(sorted(slots, key=lambda slot: slot.offset))
    return {packed: found[packed] for packed in layout}


def neighbours(nodes: Nodes, model: Any, adapters: Sequence[Adapter]) -> Adapter | None:
    """What the adapters lack so that every node that modules share is scaled as a whole.

    An adapter of queries alone needs slots for keys and values too, or the graph would have to put
    ones beside its scale in every run.

    Returns:
        The base model's own values for them; None if nothing is missing.
    """
    scaled = {
        path
        for adapter in adapters
        for path, scale in adapter.scales.items()
        if scale.side == "output"
    }
    biased = {path for adapter in adapters for path in adapter.biases}
    shared = _modules_by_node(nodes)
    scales = {
        path: Scale(np.ones(output_width(module)))
        for path, module in ((path, model.get_submodule(path)) for path in _beside(scaled, shared))
    }
    biases = {
        path: model.get_submodule(path).bias.detach().double().cpu().numpy()
        for path in _beside(biased, shared)
        if model.get_submodule(path).bias is not None
    }
    return Adapter(name="neighbours", scales=scales, biases=biases) if scales or biases else None


def _beside(paths: set[str], shared: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules that share a node with one of `paths` but are not in it."""
    touched = [group for group in shared.values() if paths & set(group)]
    return [path for group in touched for path in group if path not in paths]


def _modules_by_node(nodes: Nodes) -> Mapping[str, list[str]]:
    found = defaultdict(list)
    for path, places in nodes.places.items():
        for place in places:
            found[place.node].append(path)
    return found


def _check_possible(nodes: Nodes, layout: Layout) -> None:
    findings = [
        f"{slot.path}: {reason}"
        for packed, slots in layout.items()
        for slot in slots
        if (reason := _reason_against(nodes, packed, slot))
    ]
    if findings:
        raise AdapterError(*findings, remedy=REMEDY)


def _reason_against(nodes: Nodes, packed: str, slot: Slot) -> str | None:
    if packed == MODULES_INPUT:
        return "is saved whole, which the graph of onnxruntime-genai's builder has no input for"
    if len(slot.shape) > 1:
        return "scales experts, which onnxruntime-genai's builder has packed into one node"
    places = nodes.places.get(slot.path)
    if places is None:
        return "has no node of its own in the graph of onnxruntime-genai's builder"
    alone = len(places) == 1 and len(_modules_by_node(nodes)[places[0].node]) == 1
    if slot.side == "input" and (not alone or nodes.product(places[0]) is None):
        return "has an input that onnxruntime-genai's builder packs with others"
    return None


def _by_node(nodes: Nodes, slots: Iterable[Slot]) -> Iterator[list[_Part]]:
    """The parts of slots that one node computes, in the order of its channels.

    Raises:
        AdapterError: they are not one behind the other, or not all that the node computes.
    """
    groups: dict[tuple[str, str], list[_Part]] = defaultdict(list)
    for slot in slots:
        for place in nodes.places[slot.path]:
            groups[place.node, slot.side].append(_Part(place, slot, slot.offset + place.source))
    shared = _modules_by_node(nodes)
    for (node, _), parts in groups.items():
        parts.sort(key=lambda part: part.place.begin)
        distances = {part.offset - part.place.begin for part in parts}
        if len(distances) > 1 or len(parts) < len(shared[node]):
            raise AdapterError(
                f"{node}: the layout has {', '.join(part.slot.path for part in parts)}, expected "
                f"{', '.join(shared[node])} one behind the other",
                remedy=REMEDY,
            )
        yield parts


def _joined(parts: Sequence[_Part]) -> Slot:
    """One slot for the parts; the slot itself where it is the only one, whole."""
    first = parts[0]
    length = first.slot.length
    if first.slot.side == "output":
        length = sum(part.place.width for part in parts)
    if len(parts) == 1 and length == first.slot.length:
        return first.slot
    path = first.place.node.removeprefix("/").replace("/", ".")
    return Slot(path, first.offset, length, (length,), first.slot.side)


def _multiply_(nodes: Nodes, part: _Part, scale: ir.Value) -> None:
    if part.slot.side == "output":
        nodes.multiply_(part.place, scale)
        return
    product = nodes.product(part.place)
    assert product is not None
    scale_input_(nodes.graph, product, scale)


def _add_(nodes: Nodes, part: _Part, bias: ir.Value) -> None:
    """Put a bias in the place of the node's own; the builder leaves out a bias that is zero.

    The bias of a norm is an input of its node, which has one for all rows: it becomes zero there.
    """
    norm = nodes.norm(part.place)
    if norm is not None:
        index = _NORM_BIAS[norm.op_type]
        own = norm.inputs[index]
        assert own is not None
        assert own.dtype is not None
        zeros = np.zeros(bias.shape.numpy() if bias.shape else (), own.dtype.numpy())
        _replace_(nodes.graph, norm, index, add_constant(nodes.graph, f"{own.name}.zero", zeros))
        nodes.add_(part.place, bias)
    elif (node := nodes.bias(part.place)) is not None:
        _replace_(nodes.graph, node, 1, bias)
    else:
        nodes.add_(part.place, bias)


def _initializer(graph: ir.Graph, name: str, values: Array) -> ir.Value:
    """A new initializer; one of the builder's that has the name, as norms' biases, gets another."""
    if (own := graph.initializers.get(name)) is not None:
        own.name = f"{name}.own"
    return add_constant(graph, name, values)


def _replace_(graph: ir.Graph, node: ir.Node, index: int, new: ir.Value) -> None:
    """Give a node another initializer; the old one goes if nothing else reads it."""
    old = node.inputs[index]
    node.replace_input_with(index, new)
    if old is not None and not old.uses():
        graph.initializers.pop(str(old.name), None)
