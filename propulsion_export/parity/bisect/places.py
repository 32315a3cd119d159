"""Where the output of each module is in a graph, found by what reads the module's weight.

A written graph keeps nothing of the exporter's scopes; weights keep their names, and a graph of
onnxruntime-genai's builder names its nodes by layer. A module's output is the value of the node
that computes with its weight, or one shortly behind it: a bias, a scale and a change of shape may
follow, and numbers tell which it is.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import nn

from propulsion_export.graph.genai.nodes import Nodes
from propulsion_export.graph.optimise import TRANSPOSED
from propulsion_export.parity.bisect.modules import Call
from propulsion_export.scaling.layer_rules import layer_kind

# How the weight of a module may be called: as traced, transposed, or quantised.
_ENDINGS = ("", TRANSPOSED, "_Q4", "_Q8", "_DQ_Q4", "_DQ_Q8")
_LOOKUPS = ("Gather", "GatherBlockQuantized", "GatherND", "GatherElements")
# What may stand between the product with a weight and the module's output.
_BEHIND = ("Add", "Mul", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Slice", "Where")
_FURTHEST = 6


@dataclass(frozen=True)
class Place:
    """Values of a graph, one of which is a module's output or a part of it.

    Attributes:
        values: their names, in the order they are computed.
        width: how many channels are the module's; None: all.
        begin: the first of them in the values.
        source: the first of them in the module's output.
    """

    values: tuple[str, ...]
    width: int | None = None
    begin: int = 0
    source: int = 0


Places = Mapping[Call, tuple[Place, ...]]


def find_places(
    program: ir.Model, model: Any, active: Collection[ir.Value], exporter: str
) -> Places:
    """The places of every call of a module that a graph has a node for.

    Args:
        program: the graph as it was written.
        model: the torch model whose modules are looked for.
        active: the values that depend on the data.
        exporter: what produced the graph, `transformers` or `genai`.
    """
    if exporter == "genai":
        return _of_builder(program, model, active)
    names = _names_of_weights(model)
    found: dict[Call, tuple[Place, ...]] = {}
    for path, module in model.named_modules():
        nodes = _nodes(program.graph, module, names, active)
        for call, node in enumerate(sorted(nodes, key=_order(program.graph))):
            found[path, call] = (Place(tuple(_chain(node.outputs[0], active))),)
    return found


def _of_builder(program: ir.Model, model: Any, active: Collection[ir.Value]) -> Places:
    nodes = Nodes(model, program)
    return {
        (path, 0): tuple(
            Place(
                tuple(_chain(nodes.output(place), active)), place.width, place.begin, place.source
            )
            for place in places
        )
        for path, places in nodes.places.items()
    }


def _names_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter, by its identity: a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _nodes(
    graph: ir.Graph,
    module: nn.Module,
    names: Mapping[int, list[str]],
    active: Collection[ir.Value],
) -> list[ir.Node]:
    """The nodes that compute with a module's weight on the data."""
    weight = module._parameters.get("weight")
    if weight is None:
        return []
    stored = (f"{name}{ending}" for name in names.get(id(weight), ()) for ending in _ENDINGS)
    looks_up = layer_kind(module) == "embedding"
    found = {
        node: None
        for name in stored
        if name in graph.initializers
        for node in _readers(graph.initializers[name], active)
        if (node.op_type in _LOOKUPS) == looks_up
    }
    return list(found)


def _readers(value: ir.Value, active: Collection[ir.Value]) -> Iterator[ir.Node]:
    """The first nodes behind a weight whose outputs depend on the data."""
    for node, _ in value.uses():
        if any(output in active for output in node.outputs):
            yield node
        else:
            yield from (found for each in node.outputs for found in _readers(each, active))


def _order(graph: ir.Graph) -> Any:
    places = {node: place for place, node in enumerate(graph)}
    return places.__getitem__


def _chain(value: ir.Value, active: Collection[ir.Value]) -> Iterator[str]:
    """A value and those that follow without another product, by name."""
    waiting, seen = [(value, 0)], set()
    while waiting:
        value, steps = waiting.pop(0)
        if value in seen or value not in active:
            continue
        seen.add(value)
        yield str(value.name)
        if steps < _FURTHEST:
            waiting += [
                (user.outputs[0], steps + 1)
                for user, _ in value.uses()
                if user.op_type in _BEHIND and not user.domain
            ]
