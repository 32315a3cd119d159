"""The base model with the weights that its quantised layers have.

The weights are quantised again, from the base model, and not read from the artifact: an artifact
with a wrong scale or a wrong integer would otherwise be its own reference. The artifact's
integers then have to be these, and its scales these or, with an adapter folded in, these times the
adapter's.

A node of the graph is recognised by its integers, so that no name matters. Its rows may be those of
several layers, one behind the other, or half of those of one.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.dtypes import dtypes_of_tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.quantisation.node_weights import NodeWeight, Use
from propulsion_export.graph.quantisation.weights import Bits, QuantisedWeight, dequantise
from propulsion_export.parity.quantised.quantiser import quantise
from propulsion_export.parity.reports.report import Check
from propulsion_export.scaling.layer_rules import layer_kind

_USES: dict[str | None, Use] = {"linear": "linear", "conv1d": "linear", "embedding": "embedding"}
_SHOWN = 3  # of the nodes that are wrong


@dataclass(frozen=True)
class BaseWeight:
    """The quantised weight of one layer of the base model, by the path of its module.

    `signed`: its integers with the signs and zeros of a folded adapter's scales, which a graph for
    TensorRT may have instead; None where they are the same.
    """

    path: str
    values: QuantisedWeight
    signed: Array | None = None

    @property
    def integers(self) -> Iterator[Array]:
        """The integers that a graph may have, int8 [outputs, inputs]."""
        yield self.values.integers
        if self.signed is not None:
            yield self.signed


@dataclass(frozen=True)
class Piece:
    """Rows of a node's weight that are rows of one layer of the base model."""

    node: NodeWeight
    start: int  # the first row of the node
    weight: BaseWeight
    first: int  # the first row of the layer
    rows: int

    @property
    def found(self) -> Array:
        """The node's scales of these rows."""
        return self.node.values.scales[self.start : self.start + self.rows]

    @property
    def expected(self) -> Array:
        """The base model's scales of these rows."""
        return self.weight.values.scales[self.first : self.first + self.rows]


@dataclass(frozen=True)
class Match:
    """The rows of a graph's quantised weights, and what no layer of the base model explains."""

    pieces: tuple[Piece, ...]
    unknown: tuple[NodeWeight, ...]

    @property
    def weights(self) -> list[BaseWeight]:
        """The layers, each once."""
        return list({piece.weight.path: piece.weight for piece in self.pieces}.values())


def match(
    base: BaseModel, nodes: Sequence[NodeWeight], dtype: str, folded: Adapter | None = None
) -> Match:
    """Quantise the layers of `base` as the nodes are, and find each node's rows among them.

    Args:
        base: the base model, not quantised.
        nodes: the quantised weights of a graph.
        dtype: of the graph's other weights, in which the base model's were quantised.
        folded: the adapter that is folded into the graph, if any; where quantisation scales have to
            be positive, the signs of its scales may be in the integers.
    """
    pieces: list[Piece] = []
    unknown: list[NodeWeight] = []
    ordered = sorted(nodes, key=_form)
    for form, same in groupby(ordered, key=_form):
        weights = list(_quantised(base.model, form, dtype))
        if form.positive:
            weights = [_with_signs(weight, folded) for weight in weights]
        known = _first_rows(weights)
        for node in same:
            found = _pieces(node, known)
            if found is None:
                unknown.append(node)
            pieces += found or []
    return Match(tuple(pieces), tuple(unknown))


def every_linear_layer(
    base: BaseModel, entry: QuantizationEntry, kept: Collection[str], dtype: str
) -> list[BaseWeight]:
    """What an engine has, whose weights cannot be read: all linear layers, quantised alike.

    Args:
        base: the base model, not quantised.
        entry: how its weights are quantised.
        kept: parameters that adapters bring, which are not.
        dtype: of the other weights.
    """
    form = _Form("linear", entry.bits, entry.block_size, entry.form == "qdq")
    weights = _quantised(base.model, form, dtype)
    return [weight for weight in weights if f"{weight.path}.weight" not in kept]


def use_quantised_weights_(base: BaseModel, weights: Iterable[BaseWeight]) -> None:
    """Give layers of `base` their dequantised weights, in float64.

    Layers that share a weight no longer do: each computes with what its own node has.
    """
    for weight in weights:
        module: Any = base.model.get_submodule(weight.path)
        values = torch.from_numpy(dequantise(weight.values))
        if layer_kind(module) == "conv1d":
            values = values.T.contiguous()
        module.weight = nn.Parameter(values, requires_grad=False)


def check_weights(found: Match, folded: Adapter | None) -> Check:
    """Check integers and scales against the base model's, byte by byte.

    Args:
        found: the graph's weights among the base model's.
        folded: the adapter that is folded into the graph, if any. A layer's scales may be those of
            the base model nevertheless: its adapter's scale may be a Mul behind it, and whether it
            is there the other cases say.
    """
    name = "base" if folded is None else folded.name
    wrong = [f"{node.name}: integers of no layer of the base model" for node in found.unknown]
    kept = [_rows_as(piece, 1.0) for piece in found.pieces]
    times = [_folded_rows(piece, folded) for piece in found.pieces]
    wrong += [
        _difference(piece, ~(one | other), folded)
        for piece, one, other in zip(found.pieces, kept, times, strict=True)
        if not (one | other).all()
    ]
    if wrong or not found.pieces:
        shown = "; ".join(wrong[:_SHOWN]) or "the graph has no quantised weight"
        more = f"; {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        return Check("weights", name, False, f"{shown}{more}")
    layers = len({piece.weight.path for piece in found.pieces})
    scaled = {
        piece.weight.path for piece, one in zip(found.pieces, kept, strict=True) if not one.all()
    }
    detail = f"integers and scales of {layers} layers are the base model's, byte for byte"
    if scaled:
        detail += f"; the scales of {len(scaled)} times the adapter's, rounded once"
    return Check("weights", name, True, detail)


@dataclass(frozen=True, order=True)
class _Form:
    """How a node's weight is quantised; nodes of one form are explained by one pass."""

    use: Use
    bits: Bits
    block: int
    positive: bool


def _form(node: NodeWeight) -> _Form:
    return _Form(node.use, node.bits, node.values.block_size, node.positive)


def _quantised(model: nn.Module, form: _Form, dtype: str) -> Iterator[BaseWeight]:
    precision = getattr(torch, dtype)
    dtypes = dtypes_of_tensors(model, precision)
    for path, module in model.named_modules(remove_duplicate=False):
        kind = layer_kind(module)
        if _USES.get(kind) != form.use:
            continue
        weight: Any = module.weight
        own = weight.detach().to(dtypes.get(id(weight), precision)).cpu().numpy()
        values = own.T if kind == "conv1d" else own
        if form.block and form.positive and values.shape[1] % form.block:
            continue  # only blocks of one length can be quantised so
        yield BaseWeight(path, quantise(values, form.bits, form.block, positive=form.positive))


def _with_signs(weight: BaseWeight, folded: Adapter | None) -> BaseWeight:
    scale = None if folded is None else folded.scales.get(weight.path)
    if scale is None or scale.side != "output" or (scale.values > 0).all():
        return weight
    signs = np.sign(scale.values).astype(np.int8)[:, None]
    return replace(weight, signed=weight.values.integers * signs)


_Known = dict[bytes, list[tuple[BaseWeight, int]]]


def _first_rows(weights: Iterable[BaseWeight]) -> _Known:
    """Where a node's rows may begin: at the first row of a layer, or at its half."""
    known: _Known = {}
    for weight in weights:
        rows = len(weight.values.integers)
        for integers in weight.integers:
            for row in {0, rows // 2}:
                known.setdefault(integers[row].tobytes(), []).append((weight, row))
    return known


def _pieces(node: NodeWeight, known: _Known) -> list[Piece] | None:
    """The rows of a node, layer by layer; None if some are of no layer."""
    pieces: list[Piece] = []
    start, rows = 0, len(node.values.integers)
    while start < rows:
        key = node.values.integers[start].tobytes()
        options = (_piece(node, start, weight, first) for weight, first in known.get(key, ()))
        piece = next((option for option in options if option is not None), None)
        if piece is None:
            return None
        pieces.append(piece)
        start += piece.rows
    return pieces


def _piece(node: NodeWeight, start: int, weight: BaseWeight, first: int) -> Piece | None:
    """All rows of a layer from `first` on, or its half, if the node has them at `start`."""
    whole = len(weight.values.integers) - first
    for rows in (whole, len(weight.values.integers) // 2):
        own = node.values.integers[start : start + rows]
        options = (integers[first : first + rows] for integers in weight.integers)
        if len(own) == rows and any(np.array_equal(own, option) for option in options):
            return Piece(node, start, weight, first, rows)
    return None


def _rows_as(piece: Piece, factor: Array | float) -> Array:
    """The rows, bool [rows], whose scales are the base model's times `factor`, rounded once."""
    if piece.found.shape != piece.expected.shape:
        return np.zeros(piece.rows, np.bool_)
    expected = rounded(piece.expected.astype(np.float64) * factor, piece.found.dtype)
    same: Array = (piece.found == expected).all(axis=1)
    return same


def _folded_rows(piece: Piece, adapter: Adapter | None) -> Array:
    """The rows, bool [rows], whose scales are the base model's times the adapter's.

    Where scales must be positive, the sign stays in a multiply.
    """
    factor = _factor(piece, adapter)
    if factor is None:
        return np.zeros(piece.rows, np.bool_)
    either: Array = _rows_as(piece, factor) | _rows_as(piece, np.abs(factor))
    return either


def _factor(piece: Piece, adapter: Adapter | None) -> Array | None:
    """The adapter's scales of these rows, float64 [rows, 1]; None if there are none."""
    scale = None if adapter is None else adapter.scales.get(piece.weight.path)
    if scale is None or scale.side != "output" or scale.values.ndim != 1:
        return None
    values: Array = scale.values[piece.first : piece.first + piece.rows, None]
    return values


def _difference(piece: Piece, wrong: Array, adapter: Adapter | None) -> str:
    factor = _factor(piece, adapter)
    expected = piece.expected * (1.0 if factor is None else factor)
    row = int(np.argmax(wrong))
    if piece.found.shape != expected.shape:
        return (
            f"{piece.weight.path}: has {piece.found.shape[1]} scales a row, expected "
            f"{expected.shape[1]}"
        )
    block = int(np.argmax(piece.found[row] != expected[row].astype(piece.found.dtype)))
    return (
        f"{piece.weight.path}: the scale of row {piece.first + row}, block {block} is "
        f"{float(piece.found[row, block]):.9g}, expected {float(expected[row, block]):.9g}"
    )
