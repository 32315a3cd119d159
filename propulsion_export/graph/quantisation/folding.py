"""Fold scales into what a quantised graph computes with; the integers stay as they are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.passes.removing import bypass
from propulsion_export.graph.passes.scale_products import ScaleProduct, products_by
from propulsion_export.graph.quantisation.sinks import Sink, Target, find_sinks, read_constant


class FoldScales(ir.passes.InPlacePass):
    """Multiply scales into quantisation scales and vectors, in float64 and rounded once.

    The integers stay byte-identical. What each scale goes into:

    - MatMulNBits: its scales, which may be negative or zero.
    - DequantizeLinear before a MatMul or Gemm: its scales, which have to be positive for TensorRT.
      The factor's magnitude goes there; the sign, or a zero, stays in a multiply of that output.
    - a MatMul or Gemm that is not quantised, the table of an embedding, the weight and bias of a
      norm (1 + weight too): the weight. A bias is multiplied in each of these cases.

    What cannot be folded keeps its multiply, with the value rounded once, and is right as well: a
    channel whose product would overflow, vanish or be subnormal in the type of the quantisation
    scales; a table or weight that something else reads too, such as one that is tied to the head;
    a scale of a layer's input; a value that is also read unscaled; experts.

    Attributes:
        values: float64, by the name of the scale's initializer; those that are not in the graph are
            skipped.
        others: float64, by the name of the initializer: what the adapter brings besides scales,
            trained biases and saved modules, which are set.
        signs: whether negative scales and zeros change the integers behind a DequantizeLinear, so
            that no multiply by a sign is left. A channel that uses the lowest integer, which has no
            counterpart above zero, keeps its multiply.
        multiplied: after the call, the names of the scales that still have a multiply.
    """

    def __init__(
        self,
        values: Mapping[str, Array],
        others: Mapping[str, Array] | None = None,
        *,
        signs: bool = False,
    ) -> None:
        super().__init__()
        self.signs = signs
        self.values = values
        self.others = others or {}
        self.multiplied: list[str] = []

    def requires(self, model: ir.Model) -> None:
        for name, values in (*self.values.items(), *self.others.items()):
            value = model.graph.initializers.get(name)
            if value is not None and value.shape != values.shape:
                raise ir.passes.PreconditionError(
                    f"{name}: has shape {value.shape}, its values {values.shape}"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        names = [name for name in self.values if name in graph.initializers]
        self.multiplied = [name for name in names if self._fold_all(graph, name)]
        for name in names:
            if not graph.initializers[name].uses():
                graph.initializers.pop(name)
        for name in self.others.keys() & graph.initializers.keys():
            set_values(graph.initializers[name], self.others[name])
        return ir.passes.PassResult(model, modified=bool(names))

    def _fold_all(self, graph: ir.Graph, name: str) -> bool:
        """Fold a scale into every call of its module; whether one of them keeps a multiply."""
        scale = graph.initializers[name]
        products = list(products_by(scale))
        sinks = find_sinks(products, self.values.keys())
        kept = []
        for product in products:
            if product.node in sinks:
                left = self._fold(graph, name, sinks[product.node])
                kept.append(_leave(graph, product, left))
        set_values(scale, self.values[name])  # for the multiplies without a sink
        return any(kept) or len(kept) < len(products)

    def _fold(self, graph: ir.Graph, name: str, sink: Sink) -> Array:
        """Fold a scale into one call; returns what is left to multiply by."""
        originals = [self._read(target) for target in sink.targets]
        split = split_factor(self.values[name], sink, originals)
        moved = self._move_signs(graph, sink, split.left)
        for target, values in zip(sink.targets, originals, strict=True):
            factors = split.folded if target.quantises else split.folded * moved
            self._replace(
                graph, target, _rounded_like(values * target.spread(factors), target.value)
            )
        return np.where(moved == 1, split.left, 1)

    def _replace(self, graph: ir.Graph, target: Target, values: Array) -> None:
        old = target.value
        new = add_constant(graph, unused_name(graph, f"{old.name}.folded"), values)
        target.node.replace_input_with(target.index, new)
        self._remove_unused(graph, old)

    def _move_signs(self, graph: ir.Graph, sink: Sink, left: Array) -> Array:
        """Multiply integers by the signs and zeros of `left`; what they were multiplied by."""
        moved = np.ones_like(left)
        for target in sink.targets if self.signs and sink.positive else ():
            if target.quantises and (integers := integers_of(target)) is not None:
                moved = np.where(_can_move(integers, left), left, 1)
                if (moved != 1).any():
                    changed = (integers.values * moved).astype(integers.stored)
                    self._replace(graph, Target(target.node, 0), changed)
        return moved

    def _remove_unused(self, graph: ir.Graph, value: ir.Value) -> None:
        """Remove a constant that nothing reads any more, with what computed it."""
        node = value.producer()
        if value.uses() or value.is_graph_output():
            return
        if node is not None and len(node.outputs) == 1:
            inputs = [operand for operand in node.inputs if operand is not None]
            graph.remove(node, safe=True)
            for operand in inputs:
                self._remove_unused(graph, operand)
        elif value.name in graph.initializers:
            graph.initializers.pop(str(value.name))

    def _read(self, target: Target) -> Array:
        """The constant in float64, not rounded yet if the adapter brings it."""
        found = self.others.get(str(target.value.name))
        values = read_constant(target.value) if found is None else found
        assert values is not None
        return values.astype(np.float64)


class Integers(NamedTuple):
    """The integers of a DequantizeLinear, outputs last, int8, and the numpy type they have."""

    values: Array
    stored: np.dtype[Any]


def integers_of(target: Target) -> Integers | None:
    """The integers that quantisation scales belong to; None if they are computed."""
    value = target.node.inputs[0]
    stored = None if value is None else read_constant(value)
    return None if stored is None else Integers(stored.astype(np.int8), stored.dtype)


def _lowest(stored: np.dtype[Any]) -> int:
    return -8 if stored == ml_dtypes.int4 else -128


def _can_move(integers: Integers, left: Array) -> Array:
    """Which channels are to be multiplied by -1 or 0, and have a place for the results."""
    lowest = _lowest(integers.stored)
    negatable = (integers.values != lowest).all(axis=0)
    found: Array = (left == 0) | ((left == -1) & negatable)
    return found


class SplitFactor(NamedTuple):
    """A scale, float64 [channels], as the product of what is folded and what is multiplied."""

    folded: Array
    left: Array


def split_factor(scale: Array, sink: Sink, originals: Sequence[Array]) -> SplitFactor:
    """What of a scale can be folded into quantisation scales, channel by channel.

    Args:
        scale: float64, [channels].
        sink: where it is folded into.
        originals: the constants of the sink's targets, float64.
    """
    magnitude = np.where(scale == 0, 1, np.abs(scale)) if sink.positive else scale
    fits = np.ones(scale.shape, bool)
    for target, values in zip(sink.targets, originals, strict=True):
        if target.quantises:
            fits &= _stays_normal(values * target.spread(magnitude), target)
    folded = np.where(fits | (scale == 1), magnitude, 1)
    left = np.sign(scale) if sink.positive else np.ones_like(scale)
    return SplitFactor(folded, np.where(folded == magnitude, left, scale))


def _stays_normal(products: Array, target: Target) -> Array:
    """For each channel, whether all its new quantisation scales are stored with full precision."""
    limits = np.finfo(numpy_type(target.value))
    sizes = np.abs(products)
    good = (sizes == 0) | ((sizes >= limits.smallest_normal) & (sizes <= limits.max))
    others = tuple(axis for axis in range(good.ndim) if axis != target.axis % good.ndim)
    return np.asarray(good.all(axis=others))


def _leave(graph: ir.Graph, product: ScaleProduct, left: Array) -> bool:
    """Multiply by what is left; without anything left the multiply goes. Whether it stays."""
    if (left == 1).all():
        bypass(graph, product.node.outputs[0], product.other)
        graph.remove(product.node, safe=True)
        return False
    name = unused_name(graph, f"{product.scale.name}.left")
    new = add_constant(graph, name, _rounded_like(left, product.scale))
    product.node.replace_input_with(product.index, new)
    return True


def unused_name(graph: ir.Graph, name: str) -> str:
    """A name that no initializer has: a scale may act more than once."""
    free, count = name, 1
    while free in graph.initializers:
        free, count = f"{name}.{count}", count + 1
    return free


def set_values(value: ir.Value, values: Array) -> None:
    """Give an initializer other values, float64, rounded once to its dtype."""
    value.shape = ir.Shape(values.shape)
    value.const_value = ir.tensor(_rounded_like(values, value), name=value.name)


def _rounded_like(values: Array, value: ir.Value) -> Array:
    return rounded(values, numpy_type(value))


def numpy_type(value: ir.Value) -> np.dtype[Any]:
    """The numpy type of an initializer."""
    tensor = value.const_value
    dtype = value.dtype if tensor is None else tensor.dtype
    assert dtype is not None
    return dtype.numpy()
