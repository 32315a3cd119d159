"""The case `tables`: embeddings in the artifact, row by row, against those of the base model.

A verdict's inputs have a few hundred of a vocabulary's tokens. A table that is looked up can be
compared as a whole instead: it is the constant of the graph, or the tensor of the checkpoint, that
has the shape of an embedding of the base model and most of its rows. In a folded artifact it is
the embedding times its scale, in others the embedding itself. A table that is found nowhere (folded
into another constant, quantised, in an engine) is not covered.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
_ROWS = 4096  # compared at a time
_SHOWN = 5
# A table is recognised by this share of right rows; one of two token types may be wrong.
_RECOGNISED = 0.5


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
    """An embedding as the artifact should have it: [rows, width] in `weight` times `scale`."""

    path: str
    weight: torch.Tensor
    scale: Array | None

    def is_right(self, found: Array) -> Array:
        """Bool [rows]: whether a row is the base model's but for rounding of the found dtype."""
        limit = 2 * UNIT_ROUNDOFF[found.dtype.name]
        # The smallest number above zero, whose neighbours a relative limit does not reach.
        smallest = float(np.nextafter(np.zeros((), found.dtype), np.ones((), found.dtype)))
        parts = []
        for start in range(0, len(found), _ROWS):
            expected = self.weight[start : start + _ROWS].double().numpy()
            if self.scale is not None:
                expected = expected * self.scale
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
            _unseen(table, "the weights of an engine cannot be read") for table in tables
        ]
        return result
    stored = list(_stored(artifact))
    findings: list[str] = []
    compared = 0
    for table in tables:
        found = [right for values in stored if (right := _recognised(table, values)) is not None]
        if not found:
            result.coverage.append(_unseen(table, "no constant of the artifact has its rows"))
            continue
        compared += len(table.weight)
        result.coverage.append(
            Coverage(f"table {table.path}", True, f"all {len(table.weight):,} rows")
        )
        findings += [_wrong(table, right) for right in found if not right.all()]
    if compared:
        detail = "; ".join(findings) or f"{compared:,} rows of embeddings are the base model's"
        result.checks.append(Check("tables", "all", not findings, detail))
    return result


def _expected(base: BaseModel, folded: Adapter | None) -> list[_Table]:
    scales: Mapping[str, Any] = {} if folded is None else folded.scales
    return [
        _Table(path, module.weight.detach().cpu(), scales[path].values if path in scales else None)
        for path, module in base.model.named_modules()
        if isinstance(module, nn.Embedding)
    ]


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


def _recognised(table: _Table, stored: StoredTensor | ir.TensorProtocol) -> Array | None:
    """Which rows are right, if the tensor is the table; None if it is another one."""
    if tuple(map(_size, stored.shape)) != tuple(table.weight.shape):
        return None
    values = stored.read() if isinstance(stored, StoredTensor) else np.asarray(stored.numpy())
    if values.dtype not in _FLOATS:
        return None
    right = table.is_right(values)
    return right if right.mean() >= _RECOGNISED else None


def _size(dimension: object) -> int:
    return dimension if isinstance(dimension, int) else -1


def _wrong(table: _Table, right: Array) -> str:
    rows = np.flatnonzero(~right)
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", …" if len(rows) > _SHOWN else "")
    return f"{table.path}: {len(rows):,} of {len(right):,} rows are others (row {shown})"


def _unseen(table: _Table, reason: str) -> Coverage:
    return Coverage(f"table {table.path}", False, reason)
