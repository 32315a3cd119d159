"""A weight in bitsandbytes' 4-bit forms, NF4 and FP4.

The weights [outputs, inputs] are flattened row by row and cut into blocks. Two lie in a byte, the
first in its high half: numbers of entries of `quant_map`, float32 [16]. A weight is its entry times
its block's `absmax`, float32 [blocks]. Nested ("double quantised"), absmax is uint8 [blocks]:
nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + nested_offset, in float32.
Sources: QLoRA (arXiv 2305.14314) and `QuantState` of bitsandbytes 0.50. Its kernels only multiply
by absmax, which may therefore be negative or zero.

A nested absmax has no room for a factor of each row. It is written out in float32: 3 bytes more a
block, 9 % of a layer with blocks of 64. A block that crosses a row is cut into smaller ones of the
same absmax where bitsandbytes has their size, which adds 4 bytes for each.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.changes import Computed, Dropped, Given, StoredChange
from propulsion_export.merging.quantised.scales import rounded_products

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes accepts
_LARGEST_FLOAT16 = 65504.0
_REMEDY = "Merge into the checkpoint that is not quantised, and quantise what comes out."


@dataclass(frozen=True)
class FourBits:
    """The weight of one module."""

    path: str
    tensors: Mapping[str, StoredTensor]

    def scaled(self, scale: Array) -> Mapping[str, StoredChange]:
        """What becomes of absmax and of what describes it; scale: float64 [outputs]."""
        size = self._row_block_size()
        settings = {name: value for name, value in self._state.items() if "nested" not in name}
        return {
            f"{self._weight}.absmax": Computed.checked(partial(self._products, size, scale)),
            self._state_name: Given(_packed(settings | {"blocksize": size})),
            **{name: Dropped() for name in self._nested_names},
        }

    def entry(self, place: tuple[int, int]) -> tuple[float, float]:
        """One dequantised weight [output, input], and the step of its grid there.

        The step is the wider of those to the neighbours in `quant_map`, and what the steps of a
        nested absmax make of the weight.
        """
        index = place[0] * self.shape[1] + place[1]
        byte = int(self._bytes[index // 2,])
        number = byte & 15 if index % 2 else byte >> 4
        levels = self._tensor("quant_map").read()
        size, step = self._block(index // self._block_size)
        level = float(levels[number])
        return level * size, _gap(levels, level) * abs(size) + abs(level) * step

    def _row_block_size(self) -> int:
        """The size of the blocks to write: each lies in one row."""
        inputs = self.shape[1]
        size = math.gcd(self._block_size, inputs)
        if size not in _BLOCK_SIZES:
            raise BaseModelError(
                f"{self.path}: blocks of {self._block_size} weights cross its rows of {inputs}, "
                f"blocks of {size} would not, but the least that bitsandbytes takes is "
                f"{_BLOCK_SIZES[0]}",
                remedy=_REMEDY,
            )
        return size

    def _products(self, size: int, scale: Array) -> Array:
        """The absmax to write for each block of `size` weights, float32."""
        blocks = self._blocks(size).reshape(self.shape[0], -1)
        found = rounded_products(self.path, blocks, scale[:, None])
        self._check_range(found)
        return found.reshape(-1)

    def _blocks(self, size: int) -> Array:
        """The absmax of each block of `size` weights, float32."""
        stored = self._tensor("absmax").read()
        if self._nested_names:
            group = np.arange(stored.size) // self._state["nested_blocksize"]
            stored = self._unnested(stored, self._tensor("nested_absmax").read()[group])
        repeated = np.repeat(stored.reshape(-1), self._block_size // size)
        return repeated[: math.prod(self.shape) // size]

    def _block(self, block: int) -> tuple[float, float]:
        """The absmax of one block, and how far apart the values are that it could have had."""
        stored = self._tensor("absmax")[block,]
        if not self._nested_names:
            return stored, 0.0
        largest = self._tensor("nested_absmax")[block // self._state["nested_blocksize"],]
        levels = self._tensor("nested_quant_map").read()
        found = self._unnested(np.array(int(stored)), np.float32(largest))
        return float(found), _gap(levels, float(levels[int(stored)])) * abs(largest)

    def _unnested(self, stored: Array, largest: Any) -> Array:
        """Absmax as bitsandbytes computes it: one product and one sum, rounded to float32 each."""
        levels = self._tensor("nested_quant_map").read()
        found: Array = levels[stored] * largest + np.float32(self._state["nested_offset"])
        return found

    def _check_range(self, found: Array) -> None:
        """Refuse products that the dtype of the dequantised weights cannot hold."""
        beyond = np.argwhere(np.abs(found) > _LARGEST_FLOAT16)
        if self._state["dtype"] == "float16" and beyond.size:
            raise AdapterError(
                *(
                    f"{self.path}: channel {channel}, group {block}: its weights are up to "
                    f"{abs(found[channel, block]):.4g}, expected at most {_LARGEST_FLOAT16:.0f}, "
                    "what float16 holds, in which this layer computes"
                    for channel, block in beyond
                ),
                remedy=_REMEDY,
            )

    @property
    def _weight(self) -> str:
        return f"{self.path}.weight"

    def _tensor(self, name: str) -> StoredTensor:
        found = self.tensors.get(f"{self._weight}.{name}")
        if found is None:
            raise self._damaged(f"has no {name}")
        return found

    def _damaged(self, finding: str) -> BaseModelError:
        return BaseModelError(f"{self._weight}: {finding}", remedy="Copy the base model again.")

    @property
    def _nested_names(self) -> list[str]:
        names = (f"{self._weight}.{name}" for name in ("nested_absmax", "nested_quant_map"))
        return [name for name in names if name in self.tensors]

    @cached_property
    def _state_name(self) -> str:
        names = (f"{self._weight}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
        found = [name for name in names if name in self.tensors]
        if len(found) != 1:
            raise self._damaged(f"has {len(found)} quant_state, expected one of nf4 or fp4")
        return found[0]

    @cached_property
    def _state(self) -> Mapping[str, Any]:
        """What is not a tensor in the state: blocksize, dtype, shape, and those of a nesting."""
        try:
            found: Mapping[str, Any] = json.loads(self.tensors[self._state_name].read().tobytes())
        except ValueError as error:
            raise self._damaged(f"its quant_state is no JSON ({error})") from error
        return found

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, compared with the sizes of what is stored."""
        outputs, inputs = self._state["shape"]
        blocks = -(-outputs * inputs // self._block_size)
        if self._tensor("absmax").shape != (blocks,):
            raise self._damaged(
                f"has absmax {list(self._tensor('absmax').shape)}, expected [{blocks}]: blocks of "
                f"{self._block_size} of {outputs} x {inputs} weights"
            )
        return outputs, inputs

    @property
    def _block_size(self) -> int:
        return int(self._state["blocksize"])

    @property
    def _bytes(self) -> StoredTensor:
        """The packed numbers as bytes: `bnb_4bit_quant_storage` may call them another dtype."""
        stored = self.tensors[self._weight]
        return StoredTensor(stored.file, stored.offset, (stored.size,), "U8")


def _packed(settings: Mapping[str, Any]) -> Array:
    return np.frombuffer(json.dumps(settings).encode(), np.uint8)


def _gap(levels: Array, level: float) -> float:
    """The distance from an entry of a grid to its farther neighbour."""
    ordered = np.unique(levels.astype(np.float64))
    place = int(np.searchsorted(ordered, level))
    return float(np.diff(ordered[max(place - 1, 0) : place + 2]).max())
