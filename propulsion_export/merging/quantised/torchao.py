"""Checkpoints that torchao quantised, as transformers saves them: the parts of tensor subclasses.

The header of each safetensors file has a JSON text for each parameter, which names the subclass and
the block that shares a scale. Those whose blocks lie in a row (torchao 0.18):

| subclass | `_weight_qdata` | `_weight_scale` |
|---|---|---|
| Int8Tensor, IntxUnpackedToInt8Tensor | int8 [outputs, inputs] | [outputs, groups] |
| Float8Tensor | float8 [outputs, inputs] | [outputs, groups] |
| Int4Tensor | [outputs, inputs / 2], two in a byte, the first in its low half | [groups, outputs] |

`_weight_zero_point`, where there is one, has the shape of the scales. A weight is
scale * (value - zero point); in an Int4Tensor it is scale * value + zero point, so that both are
multiplied (`int4_row_quantize_zp` of FBGEMM).
What the layer does to its inputs (`act_quant_kwargs`, `_weight_act_pre_scale`) stays as it is.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from propulsion_export.base_model.tensor_files import Array, StoredTensor, file_metadata
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.changes import Change
from propulsion_export.merging.quantised.float_grids import float8_e5m2_step, float8_step
from propulsion_export.merging.quantised.scales import scaled_scales

_BY_ROWS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_INT4 = "Int4Tensor"
_REASONS = {
    "Int4TilePackedTo4dTensor": "its integers lie in the tiles of a GPU's tensor cores",
    "Int4PlainInt32Tensor": "only Intel's and Huawei's accelerators read its integers",
    "MXTensor": "its scales are powers of two, which hold no factor",
    "NVFP4Tensor": "its scales are float8, which hold a product to 3 bits",
}
# How far apart neighbouring values of `_weight_qdata` are, by its dtype.
_STEPS: Mapping[str, Callable[[float], float]] = {
    "I8": lambda _: 1.0,
    "F8_E4M3": float8_step,
    "F8_E5M2": float8_e5m2_step,
}
_REMEDY = "Merge into the checkpoint that is not quantised, and quantise what comes out."


def find(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> "TorchAo | None":
    """The layout of a checkpoint of torchao; None if it is another."""
    return TorchAo(settings, tensors) if settings.get("quant_method") == "torchao" else None


@dataclass(frozen=True)
class TorchAo:
    """See `Layout`.

    Attributes:
        config: the checkpoint's `quantization_config`.
        tensors: the checkpoint's tensors by name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def has(self, path: str) -> bool:
        return f"{path}._weight_qdata" in self.tensors

    def shape(self, path: str) -> tuple[int, int]:
        outputs, inputs = self._part(path, "qdata").shape
        return outputs, inputs * 2 if self._kind(path) == _INT4 else inputs

    def scaled(self, path: str, scale: Array) -> Mapping[str, Change]:
        is_int4 = self._kind(path) == _INT4
        changes: dict[str, Change] = {}
        for part in ("scale", "zero_point") if is_int4 else ("scale",):
            name, stored = f"{path}._weight_{part}", self._part(path, part)
            changes |= scaled_scales(path, name, stored, scale, axis=1 if is_int4 else 0)
        return changes

    def unscaled(self, path: str) -> Mapping[str, Change]:
        return {}

    def settings(self) -> Mapping[str, Any]:
        return self.config

    def entry(self, path: str, place: tuple[int, int]) -> tuple[float, float]:
        output, column = place
        scales, zeros = self._part(path, "scale"), self.tensors.get(f"{path}._weight_zero_point")
        groups = scales.shape[self._kind(path) != _INT4]
        group = column * groups // self.shape(path)[1]
        if self._kind(path) == _INT4:
            scale, zero = scales[group, output], self._part(path, "zero_point")[group, output]
            return scale * self._half_byte(path, place) + zero, abs(scale)
        scale, zero = scales[output, group], zeros[output, group] if zeros else 0.0
        values = self._part(path, "qdata")
        return scale * (values[place] - zero), abs(scale) * _STEPS[values.dtype](values[place])

    def _half_byte(self, path: str, place: tuple[int, int]) -> int:
        """A signed integer of four bits; the first of two lies in the low half of their byte."""
        byte = int(self._part(path, "qdata")[place[0], place[1] // 2])
        bits = byte >> 4 & 15 if place[1] % 2 else byte & 15
        return bits - 16 if bits > 7 else bits

    def _part(self, path: str, part: str) -> StoredTensor:
        found = self.tensors.get(f"{path}._weight_{part}")
        if found is None:
            raise BaseModelError(
                f"{path}: has no _weight_{part}", remedy="Copy the base model again."
            )
        return found

    def _kind(self, path: str) -> str:
        """The subclass of a weight whose blocks lie in rows.

        Raises:
            BaseModelError: they do not, or it is another subclass.
        """
        description = self._descriptions.get(f"{path}.weight", {})
        kind = description.get("_type", "a tensor that no header describes")
        if kind not in (*_BY_ROWS, _INT4):
            reason = _REASONS.get(kind, f"expected one of {', '.join((*_BY_ROWS, _INT4))}")
            raise BaseModelError(f"{path}: is {kind}, {reason}", remedy=_REMEDY)
        block = description.get("_data", {}).get("block_size") or [0]
        if block[0] != 1:
            raise BaseModelError(
                f"{path}: blocks of {' x '.join(map(str, block))} weights share a scale, expected "
                "them to lie in rows",
                remedy=_REMEDY,
            )
        return str(kind)

    @cached_property
    def _descriptions(self) -> Mapping[str, Mapping[str, Any]]:
        """What the headers say of each parameter, by its name."""
        files = dict.fromkeys(tensor.file for tensor in self.tensors.values())
        texts = {name: text for file in files for name, text in file_metadata(file).items()}
        found = {name: json.loads(text) for name, text in texts.items() if "." in name}
        return {name: value for name, value in found.items() if isinstance(value, dict)}
