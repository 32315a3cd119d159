"""Fold scales into the weights that a graph computes with, as the fold of a checkpoint does."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.errors import AdapterError
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.passes.removing import bypass, remove_chain
from propulsion_export.graph.passes.scale_products import ScaleProduct, products_by
from propulsion_export.graph.quantisation.folding import numpy_type, set_values, unused_name
from propulsion_export.graph.quantisation.linear_layers import as_linear_layer
from propulsion_export.graph.quantisation.sinks import find_sink
from propulsion_export.graph.refolding.chains import Chain, chain_of
from propulsion_export.scaling.attach import BUFFERS

_BLOCK = 1 << 18  # weights that are multiplied at a time


@dataclass(frozen=True)
class Factors:
    """What a constant that a node reads, as input `index`, is multiplied by.

    `values` are float64 and broadcast with the constant; each of their axes is 1 or the constant's.
    """

    node: ir.Node
    index: int
    values: Array

    @property
    def chain(self) -> Chain | None:
        """Where the constant comes from."""
        value = self.node.inputs[self.index]
        return None if value is None else chain_of(value)


class FoldWeights(ir.passes.InPlacePass):
    """Multiply scales into weights and biases, in float64 and rounded once; the multiplies go.

    An output scale goes into the node that computes the output, as in `quantisation.sinks`, an
    input scale into the weights of the layers that read the input, one of experts into their
    three-dimensional weight. A norm of 1 + w gets (1 + w) s - 1. Weights keep their names.

    Attributes:
        values: float64, by the name of the scale's initializer; those that are not in the graph are
            skipped.
        others: float64, by the name of the initializer: trained biases and saved modules, set.
        left: after the call, the scales that nothing was found for; the graph is of no use then.
        folded: after the call, the names of the weights that were multiplied.
        copied: after the call, the size in bytes of each matrix, by its name, that something else
            reads as well, and that was copied therefore.
    """

    def __init__(
        self, values: Mapping[str, Array], others: Mapping[str, Array] | None = None
    ) -> None:
        super().__init__()
        self.values = values
        self.others = others or {}
        self.left: list[str] = []
        self.folded: set[str] = set()
        self.copied: dict[str, int] = {}
        self._new: dict[ir.Value, list[tuple[Array, ir.Value]]] = defaultdict(list)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for name in self.others.keys() & graph.initializers.keys():
            set_values(graph.initializers[name], self.others[name])
        names = [name for name in self.values if name in graph.initializers]
        for name in names:
            self._fold_all(graph, name)
        for old, replacements in self._new.items():
            self._name(graph, old, [new for _, new in replacements])
        return ir.passes.PassResult(model, modified=bool(names))

    def _fold_all(self, graph: ir.Graph, name: str) -> None:
        scale = graph.initializers[name]
        idle = (self.values[name] == 1).all()
        for product in list(products_by(scale)):
            found = [] if idle else list(_factors(product, name, self.values))
            chains = [each.chain for each in found]
            if not idle and (not found or None in chains):
                self.left.append(name)
                return
            for each, chain in zip(found, chains, strict=True):
                assert chain is not None
                new = self._scaled(graph, name, each.values, chain)
                chain.lead_to_(graph, each.node, each.index, new)
            bypass(graph, product.node.outputs[0], product.other)
            graph.remove(product.node, safe=True)
        remove_chain(graph, scale)
        graph.initializers.pop(name)

    def _scaled(self, graph: ir.Graph, name: str, factors: Array, chain: Chain) -> ir.Value:
        """The initializer of the products; a weight that several calls read gets one."""
        old = chain.initializer
        by = factors.T if chain.swapped else factors
        for known, new in self._new[old]:
            if np.array_equal(known, by):
                return new
        exact = self.others.get(str(old.name))
        stored = _stored(old) if exact is None else exact
        products = multiplied(stored, by, chain.added, numpy_type(old))
        _check_finite(name, str(old.name), products)
        new = add_constant(graph, unused_name(graph, f"{old.name}.folded"), products)
        self._new[old].append((by, new))
        return new

    def _name(self, graph: ir.Graph, old: ir.Value, replacements: Sequence[ir.Value]) -> None:
        name = str(old.name)
        self.folded.add(name)
        if old.uses() or old.is_graph_output():
            values = _stored(old)
            if values.ndim > 1:
                self.copied[name] = values.nbytes
            return
        graph.initializers.pop(name)
        replacements[0].name = name


def multiplied(stored: Array, factors: Array, added: float, dtype: np.dtype[np.generic]) -> Array:
    """(stored + added) * factors - added, computed in float64 and rounded once to `dtype`.

    Args:
        stored: of any shape and floating-point type.
        factors: float64, broadcasting with it.
        added: 1 for the weight of a norm of 1 + w, else 0.
        dtype: of the result.
    """
    products = np.empty(stored.shape, dtype)
    step = max(1, _BLOCK // max(1, stored[:1].size)) if stored.ndim else 1
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        wide = stored[rows].astype(np.float64)
        by = factors[rows] if factors.shape[0] == len(stored) > 1 else factors
        exact = (wide + added) * by - added if added else wide * by
        products[rows] = rounded(exact, dtype)
    return products


def _factors(product: ScaleProduct, name: str, values: Mapping[str, Array]) -> Iterator[Factors]:
    """What the scale `name` of one call is folded into; nothing if that is not known."""
    scale = values[name]
    if name.endswith(BUFFERS["input"]):
        yield from _of_readers(product.node.outputs[0], scale)
    elif scale.ndim > 1:
        shape = product.scale.shape
        if shape is not None and len(shape) == 3:
            spread = scale.reshape(shape.numpy())
            yield Factors(product.node, 1 - product.index, spread)
    elif (sink := find_sink(product.other, scale.size, values.keys())) is not None:
        for target in sink.targets:
            spread = _spread(scale, target.value, target.axis)
            yield Factors(target.node, target.index, spread)


def _of_readers(value: ir.Value, scale: Array) -> Iterator[Factors]:
    """The weights of the linear layers that read a scaled input, if no other node reads it."""
    nodes = [node for node, index in value.uses() if index == 0 and as_linear_layer(node)]
    if len(nodes) < len(value.uses()) or value.is_graph_output():
        return
    for node in nodes:
        transposed = node.attributes.get_int("transB", 0) == 1
        yield Factors(node, 1, scale[None, :] if transposed else scale[:, None])


def _spread(scale: Array, constant: ir.Value, axis: int) -> Array:
    """Factors [channels] with as many axes as the constant that has the channels in `axis`."""
    shape = [1] * (1 if constant.shape is None else len(constant.shape))
    shape[axis] = scale.size
    return scale.reshape(shape)


def _stored(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _check_finite(name: str, weight: str, products: Array) -> None:
    if not np.isfinite(products).all():
        path = name.partition(".propulsion_")[0]
        raise AdapterError(
            f"{path}: folded, {weight} would hold values too large for {products.dtype}",
            remedy="Fold it into an artifact in float32 or bfloat16.",
        )
