"""The case `tables`: embeddings in the artifact, row by row, against those of the base model.

A verdict's inputs have a few hundred of a vocabulary's tokens. A table that is looked up can be
compared as a whole instead: it is the constant of the graph, or the tensor of the checkpoint, that
has the shape of an embedding of the base model and some of its rows, and that is no other weight of
the model (the rows of a head may be those of the embedding that it was made from). In a folded
artifact it is the embedding times its scale, or the one that was trained with the adapter; in
others it is the embedding itself. A table that is found nowhere (folded into another constant,
quantised, in an engine) is not covered. Tables of rotary positions (`rotary_tables`) are compared
too, in graphs that have them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tensor_files import StoredTensor, stored_tensors
from propulsion_export.graph.files import read_graph
from propulsion_export.parity.comparison import UNIT_ROUNDOFF
from propulsion_export.parity.reports.report import Check, Coverage
from propulsion_export.parity.rotary_tables import RotaryTable, rotary_tables
from propulsion_export.scaling.layer_rules import layer_kind

_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
_ROWS = 4096  # compared at a time
_SHOWN = 5
# A table is recognised by this share of right rows, for one of two token types may be wrong; or by
# this many rows that are not zero, as all tables have them: the others may be wrong from there on.
_RECOGNISED, _ROWS_RECOGNISED = 0.5, 8


@dataclass
class Tables:
    """What was found of the base model's embeddings.

    Attributes:
        checks: one check of all that were found; none if none was.
        coverage: each embedding, and whether it was compared.
    """

    checks: list[Check] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)


@dataclass(frozen=True)
class _Table:
    """A weight as the artifact should have it: [rows, width] in `weight` times `scale`.

    `scale`: [width], or [rows, 1]; None for none.
    """

    path: str
    weight: torch.Tensor
    scale: Array | None = None

    def is_right(self, found: Array) -> Array:
        """Bool [rows]: whether a row is the base model's but for rounding of the found dtype."""
        limit = 2 * UNIT_ROUNDOFF[found.dtype.name]
        # The smallest number above zero, whose neighbours a relative limit does not reach.
        smallest = float(np.nextafter(np.zeros((), found.dtype), np.ones((), found.dtype)))
        parts = []
        for start in range(0, len(found), _ROWS):
            expected = self.weight[start : start + _ROWS].double().numpy()
            if self.scale is not None:
                here = self.scale[start : start + _ROWS] if self.scale.ndim == 2 else self.scale
                expected = expected * here
            rows = found[start : start + _ROWS].astype(np.float64)
            parts.append((np.abs(rows - expected) <= limit * np.abs(expected) + smallest).all(1))
        right: Array = np.concatenate(parts)
        return right


def compare_tables(artifact: Artifact, base: BaseModel, adapters: Sequence[Adapter]) -> Tables:
    """Compare every embedding of the base model that can be found in an artifact.

    Args:
        artifact: what is judged.
        base: its base model, whose weights have not been rounded to the artifact's precision.
        adapters: its adapters; the scales of the first are folded in, if it is folded.
    """
    folded = adapters[0] if adapters and artifact.manifest.mode == "folded" else None
    tables = _expected(base, folded)
    result = Tables()
    if artifact.manifest.kind == "engine":
        result.coverage += [
            _unseen(table.path, "the weights of an engine cannot be read") for table in tables
        ]
        return result
    stored = list(_stored(artifact))
    findings: list[str] = []
    compared = 0
    others = _other_weights(base, adapters, folded)
    for table in tables:
        found = [
            right for each in stored if (right := _recognised(table, each, others)) is not None
        ]
        if not found:
            result.coverage.append(_unseen(table.path))
            continue
        compared += len(table.weight)
        result.coverage.append(_seen(table.path, len(table.weight)))
        findings += [_wrong(table.path, right) for right in found if not right.all()]
    if artifact.manifest.exporter == "genai":
        positions = list(rotary_tables(base.model))
        rotary = list(_rotary(stored, positions))
        compared += sum(len(right) for _, right in rotary)
        result.coverage += [_seen(name, len(right)) for name, right in rotary]
        findings += [_wrong(name, right) for name, right in rotary if not right.all()]
        names = {name for name, _ in rotary}
        result.coverage += [_unseen(each.name) for each in positions if each.name not in names]
    if compared:
        detail = "; ".join(findings) or f"{compared:,} rows of tables are the base model's"
        result.checks.append(Check("tables", "all", not findings, detail))
    return result


def _expected(base: BaseModel, folded: Adapter | None) -> list[_Table]:
    tables = []
    for path, module in base.model.named_modules():
        if isinstance(module, nn.Embedding):
            trained = None if folded is None else _trained(base, folded, module.weight)
            weight = module.weight.detach().cpu() if trained is None else trained
            tables.append(_Table(path, weight, _scale_of(path, module, folded)))
    return tables


def _trained(base: BaseModel, adapter: Adapter, weight: torch.Tensor) -> torch.Tensor | None:
    """The values that an adapter brings in the place of a weight, by any of its names."""
    names = base.model.named_parameters(remove_duplicate=False)
    own = [name for name, parameter in names if parameter is weight and name in adapter.modules]
    return torch.from_numpy(np.asarray(adapter.modules[own[0]])) if own else None


def _scale_of(path: str, module: nn.Module, folded: Adapter | None) -> Array | None:
    """The scale that is folded into a module's weight, so that it multiplies [rows, width]."""
    scale = None if folded is None else folded.scales.get(path)
    if scale is None or scale.values.ndim != 1:
        return None
    by_row = layer_kind(module) == "linear" and scale.side == "output"
    return scale.values[:, None] if by_row else scale.values


def _other_weights(
    base: BaseModel, adapters: Sequence[Adapter], folded: Adapter | None
) -> list[_Table]:
    """What else an artifact may have in the shape of an embedding: heads, and what was trained."""
    weights = [
        _Table(path, module.weight.detach().cpu(), scale)
        for path, module in base.model.named_modules(remove_duplicate=False)
        if layer_kind(module) is not None and getattr(module, "weight", None) is not None
        for scale in {id(s): s for s in (None, _scale_of(path, module, folded))}.values()
    ]
    trained = [
        _Table(name, torch.from_numpy(np.asarray(values)))
        for adapter in adapters
        for name, values in adapter.modules.items()
    ]
    return [each for each in (*weights, *trained) if each.weight.ndim == 2]


def _stored(artifact: Artifact) -> Iterator[StoredTensor | ir.TensorProtocol]:
    """The tensors of an artifact, read only when they are asked for."""
    if artifact.manifest.kind == "merged":
        for file in sorted(artifact.directory.glob("*.safetensors")):
            yield from stored_tensors(file).values()
        return
    for name in list(artifact.manifest.graphs) or [GRAPH_FILE]:
        graph = read_graph(artifact.directory, name).graph
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
        yield from (
            node.attributes["value"].as_tensor()
            for node in graph.all_nodes()
            if node.op_type == "Constant" and "value" in node.attributes
        )


def _recognised(
    table: _Table, stored: StoredTensor | ir.TensorProtocol, others: Sequence[_Table]
) -> Array | None:
    """Which rows are right, if the tensor is the table; None if it is another one."""
    if tuple(map(_size, stored.shape)) != tuple(table.weight.shape):
        return None
    if (values := _read(stored)) is None:
        return None
    right = table.is_right(values)
    if right.all():
        return right
    telling = right & (table.weight != 0).any(dim=1).numpy()
    if right.mean() < _RECOGNISED and telling.sum() < _ROWS_RECOGNISED:
        return None
    same = [other for other in others if other.weight.shape == table.weight.shape]
    return None if any(other.is_right(values).all() for other in same) else right


def _rotary(
    stored: Sequence[StoredTensor | ir.TensorProtocol], tables: Sequence[RotaryTable]
) -> Iterator[tuple[str, Array]]:
    """Each table of rotary positions of a graph, and which of its rows are right."""
    for tensor in stored:
        fitting = [table for table in tables if table.fits(tuple(map(_size, tensor.shape)))]
        values = _read(tensor) if fitting else None
        if values is None:
            continue
        for table in fitting:
            if table.recognises(values):
                yield table.name, table.is_right(values, np.arange(len(values)))
                break


def _read(tensor: StoredTensor | ir.TensorProtocol) -> Array | None:
    """Its values; None if they are no floating-point numbers."""
    values = tensor.read() if isinstance(tensor, StoredTensor) else np.asarray(tensor.numpy())
    return values if values.dtype in _FLOATS else None


def _size(dimension: object) -> int:
    return dimension if isinstance(dimension, int) else -1


def _seen(name: str, rows: int) -> Coverage:
    return Coverage(f"table {name}", True, f"all {rows:,} rows")


def _wrong(name: str, right: Array) -> str:
    rows = np.flatnonzero(~right)
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", …" if len(rows) > _SHOWN else "")
    return f"{name}: {len(rows):,} of {len(right):,} rows are others (row {shown})"


def _unseen(name: str, reason: str = "no constant of the artifact has its rows") -> Coverage:
    return Coverage(f"table {name}", False, reason)
