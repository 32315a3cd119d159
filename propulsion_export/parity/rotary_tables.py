"""Rotary positions in a graph, row by row, against those that the base model computes.

A graph of onnxruntime-genai's builder looks cosines and sines of positions up in tables as long as
the model's context; the rows of a verdict reach far fewer positions. A table is recognised by its
rows: eight of them must be right. What reads it, and whether cosines are taken for sines, the other
cases say.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from propulsion_export.adapters.scales import Array
from propulsion_export.parity.comparison import UNIT_ROUNDOFF

_ROWS = 4096  # compared at a time
_LOOKED_AT = 32  # rows from the start, and as many spread over the table, that may recognise it
_RECOGNISED = 8
# Of an angle, in units of float32's roundoff: that of the frequency and of the product.
_ANGLE = 16


@dataclass(frozen=True)
class RotaryTable:
    """What one table holds: the cosines or the sines of a rotary embedding of the model.

    Attributes:
        path: the module that computes them, with the kind of layer where there are several.
        part: 0: cosines, 1: sines.
        channels: how many the module rotates. Both halves have the same, so that a row of a table
            has half of them, or all where the module itself computes one half.
    """

    path: str
    part: int
    channels: int
    _module: nn.Module
    _layer_type: str | None

    @property
    def name(self) -> str:
        """As it is told."""
        return f"{('cosines', 'sines')[self.part]} of {self.path}"

    def fits(self, shape: Sequence[object]) -> bool:
        """Whether a tensor of this shape can be it."""
        return len(shape) == 2 and shape[1] in (self.channels, self.channels // 2)

    def is_right(self, found: Array, rows: Array) -> Array:
        """Bool [count]: which rows are the model's.

        A cosine may be wrong by the rounding of its dtype, and as an angle that is rounded in
        float32 makes it: position times frequency, times `_ANGLE` units.

        Args:
            found: a table, [positions, width].
            rows: int64 [count], the positions to compare.
        """
        right = []
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            positions = np.append(part, [1, len(found) - 1])
            values = _computed(self._module, positions, self._layer_type)[..., : found.shape[1]]
            cosines, sines = values[:, -2]
            angles = part[:, None] * np.abs(np.arctan2(sines, cosines))
            unit, single = UNIT_ROUNDOFF[found.dtype.name], UNIT_ROUNDOFF["float32"]
            limit = np.hypot(cosines, sines) * (2 * unit + _ANGLE * single * (1 + angles))
            error = np.abs(found[part].astype(np.float64) - values[self.part][:-2])
            right.append((error <= limit).all(1))
        return np.concatenate(right)

    def recognises(self, found: Array) -> bool:
        """Whether a tensor [positions, width] is this table, perhaps with wrong rows."""
        spread = np.linspace(0, len(found) - 1, _LOOKED_AT).astype(np.int64)
        rows = np.union1d(np.arange(min(_LOOKED_AT, len(found))), spread)
        return int(self.is_right(found, rows).sum()) >= min(_RECOGNISED, len(found))


def rotary_tables(model: nn.Module) -> Iterator[RotaryTable]:
    """The tables that a graph of a model may have."""
    config = getattr(model, "config", None)
    for path, module in model.named_modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        parameters = inspect.signature(module.forward).parameters
        if list(parameters)[:2] != ["x", "position_ids"]:
            continue
        kinds: Sequence[str | None] = [None]
        if "layer_type" in parameters:
            kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        for kind in kinds:
            label = path if kind is None else f"{path} ({kind})"
            channels = _computed(module, np.zeros(1, np.int64), kind).shape[-1]
            for part in (0, 1):
                yield RotaryTable(label, part, channels, module, kind)


def _computed(module: nn.Module, positions: Array, layer_type: str | None) -> Array:
    """Cosines and sines, float64 [2, count, channels], in a context up to the largest position."""
    own = copy.deepcopy(module).cpu()  # some keep the frequencies of the last context
    kind = {} if layer_type is None else {"layer_type": layer_type}
    with torch.no_grad():
        found = own(torch.zeros(1), torch.from_numpy(positions)[None], **kind)
    both: Array = torch.stack(list(found))[:, 0].double().numpy()
    return both
