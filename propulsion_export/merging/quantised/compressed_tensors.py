"""compressed-tensors: int8, fp8, packed integers and fp4, with scales for rows, groups or blocks.

| tensor | holds |
|---|---|
| `weight` | int8 or float8 [outputs, inputs] |
| `weight_packed` | instead, int32: integers of 1 to 8 bits without gaps; uint8: two fp4 values |
| `weight_shape` | outputs and inputs of packed integers |
| `weight_scale` | one of: [1], [outputs, 1], [outputs, groups], [row blocks, column blocks] |
| `weight_zero_point` | integers of the same shape; packed along the outputs if the weight is |
| `weight_global_scale` | nvfp4: what every scale is divided by |

A weight is scale * (value - zero point). Where rows share a scale (one for the matrix, or for a
block), each gets its own, with the same value, in every module; that is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from propulsion_export.base_model.tensor_files import DTYPES, Array, StoredTensor
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.changes import Change, Computed
from propulsion_export.merging.quantised.config_groups import ConfigGroups, Weights
from propulsion_export.merging.quantised.float_grids import float4, float4_step, float8_step
from propulsion_export.merging.quantised.layout import COMPENSATED_STEPS
from propulsion_export.merging.quantised.packing import packed_value
from propulsion_export.merging.quantised.scales import (
    exact_products,
    rounded_products,
    scaled_scales,
)

_SHARED = ("tensor", "block")  # strategies in which rows share a scale


def find(
    settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> "CompressedTensors | None":
    """The layout of a compressed-tensors checkpoint; None if it is another.

    Raises:
        BaseModelError: its weights are sparse or not compressed.
    """
    if settings.get("quant_method") != "compressed-tensors":
        return None
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    status = settings.get("quantization_status", "compressed")
    if sparsity != "dense" or status != "compressed":
        raise BaseModelError(
            f"quantization_config: its weights are {sparsity} and {status}, expected dense and "
            "compressed"
        )
    return CompressedTensors(dict(settings), tensors)


@dataclass(frozen=True)
class CompressedTensors:
    """See `Layout`.

    Attributes:
        config: the checkpoint's `quantization_config`.
        tensors: the checkpoint's tensors by name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def _groups(self) -> ConfigGroups:
        return ConfigGroups(self.config)

    def has(self, path: str) -> bool:
        return f"{path}.weight_scale" in self.tensors

    def shape(self, path: str) -> tuple[int, int]:
        shape = self.tensors.get(f"{path}.weight_shape")
        if shape is not None:
            return int(shape[0,]), int(shape[1,])
        plain = self.tensors.get(f"{path}.weight")
        outputs, inputs = (plain or self._packed(path)).shape
        return outputs, inputs if plain else 2 * inputs

    def scaled(self, path: str, scale: Array) -> Mapping[str, Change]:
        weights, name = self._groups.weights(path), f"{path}.weight_scale"
        stored = self.tensors[name]
        if weights.strategy in _SHARED:
            return self._by_rows(path, weights, scale)
        if DTYPES[stored.dtype].itemsize == 1:
            change = Computed.checked(partial(self._small_products, path, scale))
            return {} if np.array_equal(change.values, stored.read()) else {name: change}
        return scaled_scales(path, name, stored, scale)

    def unscaled(self, path: str) -> Mapping[str, Change]:
        weights = self._groups.weights(path)
        if weights.strategy not in _SHARED:
            return {}
        return self._by_rows(path, weights, np.broadcast_to(1.0, self.shape(path)[:1]))

    def settings(self) -> Mapping[str, Any]:
        return self._groups.by_rows()

    def entry(self, path: str, place: tuple[int, int]) -> tuple[float, float]:
        weights = self._groups.weights(path)
        at = self._scale_place(path, weights, place)
        scale = self._scale(path, at)
        value, step = self._value(path, weights, place)
        return scale * (value - self._zero(path, weights, at)), abs(scale) * step

    def _by_rows(self, path: str, weights: Weights, scale: Array) -> Mapping[str, Change]:
        """Scales, and zero points, of which each row has its own, times the row's factor."""
        if weights.strategy == "tensor" and not weights.symmetric and self._is_packed(path):
            raise BaseModelError(
                f"{path}: one packed zero point for the matrix, expected one for each channel"
            )
        outputs = len(scale)
        rows = outputs if weights.strategy == "tensor" else weights.block[0]

        def repeated(name: str) -> Array:
            tensor = self.tensors[name]
            return np.repeat(tensor.read().reshape(-1, _columns(tensor)), rows, axis=0)[:outputs]

        def products(name: str) -> Array:
            return rounded_products(path, repeated(name), scale[:, None])

        scales, zeros = f"{path}.weight_scale", f"{path}.weight_zero_point"
        changes: dict[str, Change] = {scales: Computed.checked(partial(products, scales))}
        if zeros in self.tensors:
            changes[zeros] = Computed.checked(partial(repeated, zeros))
        return changes

    def _small_products(self, path: str, scale: Array) -> Array:
        """Scales of one byte; powers of two may be stored as their exponents plus 127."""
        stored = self.tensors[f"{path}.weight_scale"]
        factors = scale.reshape(-1, *[1] * (len(stored.shape) - 1))
        values = stored.read()
        if stored.dtype == "U8":
            return exact_products(path, values.view(DTYPES["F8_E8M0"]), factors).view(np.uint8)
        return exact_products(path, values, factors)

    def _packed(self, path: str) -> StoredTensor:
        return self.tensors[f"{path}.weight_packed"]

    def _is_packed(self, path: str) -> bool:
        return f"{path}.weight_packed" in self.tensors

    def _scale_place(self, path: str, weights: Weights, place: tuple[int, int]) -> tuple[int, ...]:
        """Where the scale of a weight is, in a matrix of scales."""
        output, column = place
        match weights.strategy:
            case "tensor":
                return (0, 0)
            case "channel":
                return (output, 0)
            case "block":
                return (output // weights.block[0], column // weights.block[1])
        indices = self.tensors.get(f"{path}.weight_g_idx")
        group = int(indices[column,]) if indices is not None else -1
        return (output, group if group >= 0 else column // weights.group_size)

    def _scale(self, path: str, place: tuple[int, ...]) -> float:
        stored = self.tensors[f"{path}.weight_scale"]
        scale = stored[_within(stored, place)]
        if stored.dtype == "U8":
            scale = 2.0 ** (scale - 127)
        whole = self.tensors.get(f"{path}.weight_global_scale")
        return scale / whole[(0,) * len(whole.shape)] if whole is not None else scale

    def _value(self, path: str, weights: Weights, place: tuple[int, int]) -> tuple[float, float]:
        """The stored value of a weight, and how far from it what was quantised may have been."""
        if not self._is_packed(path):
            value = self.tensors[f"{path}.weight"][place]
            return value, COMPENSATED_STEPS if weights.kind == "int" else float8_step(value)
        (output, column), packed = place, self._packed(path)
        if packed.dtype == "U8":
            value = float4(int(packed[output, column // 2]) >> 4 * (column % 2) & 15)
            return value, float4_step(value)
        integer = packed_value(packed, lambda word: (output, word), column, weights.bits)
        return integer - 2.0 ** (weights.bits - 1), COMPENSATED_STEPS

    def _zero(self, path: str, weights: Weights, place: tuple[int, ...]) -> float:
        stored = self.tensors.get(f"{path}.weight_zero_point")
        if stored is None:
            return 0.0
        if stored.dtype != "I32" or not self._is_packed(path):
            return stored[_within(stored, place)]
        output, group = place
        zero = packed_value(stored, lambda word: (word, group), output, weights.bits)
        return zero - 2.0 ** (weights.bits - 1)


def _columns(tensor: StoredTensor) -> int:
    return tensor.shape[-1] if len(tensor.shape) > 1 else 1


def _within(stored: StoredTensor, place: tuple[int, ...]) -> tuple[int, ...]:
    """A place in a matrix of scales, in a tensor that may lack axes of length one."""
    return place[: len(stored.shape)]
