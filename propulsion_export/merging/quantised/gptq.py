"""GPTQ: integers packed along the inputs, a float scale for each group of inputs and each output.

| tensor | dtype, shape |
|---|---|
| `qweight` | int32 [inputs * bits / 32, outputs] |
| `scales` | float [groups, outputs] |
| `qzeros` | int32 [groups, outputs * bits / 32]; format 1 stores each zero point less one |
| `g_idx` | int32 [inputs], the group of each input; absent: groups of `group_size` |

A weight is scale * (integer - zero point), so a factor of its output goes into `scales` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from propulsion_export.base_model.tensor_files import StoredTensor
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.quantised.layout import COMPENSATED_STEPS
from propulsion_export.merging.quantised.packing import PackedColumns, packed_value

_BITS = (2, 3, 4, 8)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def find(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> "Gptq | None":
    """The layout of a GPTQ checkpoint; None if it is another.

    Raises:
        BaseModelError: it is packed for one kernel, or in a width that is not read.
    """
    if settings.get("quant_method") != "gptq":
        return None
    bits, form = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
    if form not in _ZERO_OFFSETS or bits not in _BITS:
        raise BaseModelError(
            f"quantization_config: is GPTQ of {bits} bits in the format {form}, expected one of "
            f"{', '.join(map(str, _BITS))} bits in {' or '.join(_ZERO_OFFSETS)}"
        )
    if settings.get("dynamic"):
        raise BaseModelError(
            "quantization_config: has other bits or groups for some modules (dynamic), expected "
            "the same for all"
        )
    return Gptq(dict(settings), tensors, bits, _ZERO_OFFSETS[form])


@dataclass(frozen=True)
class Gptq(PackedColumns):
    """See `Layout`.

    Attributes:
        bits: the width of an integer.
        zero_offset: what is added to a stored zero point.
    """

    bits: int
    zero_offset: int

    def shape(self, path: str) -> tuple[int, int]:
        words, outputs = self.tensors[f"{path}.qweight"].shape
        return outputs, words * 32 // self.bits

    def entry(self, path: str, place: tuple[int, int]) -> tuple[float, float]:
        output, column = place
        words, zeros = (self.tensors[f"{path}.{kind}"] for kind in ("qweight", "qzeros"))
        group = self._group(path, column)
        value = packed_value(words, lambda word: (word, output), column, self.bits)
        zero = packed_value(zeros, lambda word: (group, word), output, self.bits)
        scale = self.tensors[f"{path}.scales"][group, output]
        return scale * (value - zero - self.zero_offset), abs(scale) * COMPENSATED_STEPS

    def _group(self, path: str, column: int) -> int:
        indices = self.tensors.get(f"{path}.g_idx")
        if indices is not None:
            return int(indices[column,])
        size = self.config.get("group_size", -1)
        return column // size if size > 0 else 0
