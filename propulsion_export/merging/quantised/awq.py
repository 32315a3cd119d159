"""AWQ (version `gemm`): integers packed along the outputs in an order of their own.

| tensor | dtype, shape |
|---|---|
| `qweight` | int32 [inputs, outputs / 8] |
| `scales` | float [groups, outputs], outputs in their plain order |
| `qzeros` | int32 [groups, outputs / 8], packed like `qweight` |

A weight is scale * (integer - zero point), so a factor of its output goes into `scales` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from propulsion_export.base_model.tensor_files import StoredTensor
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.quantised.packing import PackedColumns, packed_value

_BITS, _PACKED = 4, 8
# Which four bits of a word hold each of its eight outputs (AutoAWQ's reverse order).
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def find(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> "Awq | None":
    """The layout of an AWQ checkpoint; None if it is another.

    Raises:
        BaseModelError: it is packed for another kernel, or not in 4 bits.
    """
    if settings.get("quant_method") != "awq":
        return None
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", _BITS)
    if version != "gemm" or bits != _BITS:
        raise BaseModelError(
            f"quantization_config: is AWQ of {bits} bits, version {version}, expected 4 bits, "
            "version gemm"
        )
    return Awq(dict(settings), tensors)


@dataclass(frozen=True)
class Awq(PackedColumns):
    """See `Layout`."""

    def shape(self, path: str) -> tuple[int, int]:
        inputs, words = self.tensors[f"{path}.qweight"].shape
        return words * _PACKED, inputs

    def entry(self, path: str, place: tuple[int, int]) -> tuple[float, float]:
        output, column = place
        scales = self.tensors[f"{path}.scales"]
        group = column * scales.shape[0] // self.shape(path)[1]
        value = self._integer(f"{path}.qweight", column, output)
        scale = scales[group, output]
        return scale * (value - self._zero(path, group, output)), abs(scale)

    def _zero(self, path: str, group: int, output: int) -> int:
        name = f"{path}.qzeros"
        return self._integer(name, group, output) if name in self.tensors else 1 << (_BITS - 1)

    def _integer(self, name: str, row: int, output: int) -> int:
        word, within = divmod(output, _PACKED)
        index = word * _PACKED + _ORDER[within]
        return packed_value(self.tensors[name], lambda number: (row, number), index, _BITS)
