"""Fine-grained FP8 (DeepSeek's): float8 weights with one float32 scale for each block.

| tensor | dtype, shape |
|---|---|
| `weight` | float8_e4m3fn [outputs, inputs] |
| `weight_scale_inv` | float32 or float8_e8m0fnu [row blocks, column blocks] |

A weight is value * scale. A block has several rows, usually 128 x 128, so every row of every
module gets its block's scales for itself, in float32: blocks of 1 x 128. transformers' loader takes
them; its GPU kernel computes a block of outputs at a time, for which one row is far too few, so the
merged checkpoint asks to be dequantised on loading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from propulsion_export.base_model.tensor_files import Array, StoredTensor
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.changes import Change, Computed
from propulsion_export.merging.quantised.float_grids import float8_step
from propulsion_export.merging.quantised.scales import rounded_products


def find(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> "Fp8 | None":
    """The layout of a fine-grained FP8 checkpoint; None if it is another.

    Raises:
        BaseModelError: its modules have one scale for the whole matrix.
    """
    if settings.get("quant_method") != "fp8":
        return None
    block = settings.get("weight_block_size", (128, 128))
    if not block:
        raise BaseModelError(
            "quantization_config: has one scale for each matrix (weight_block_size null), which "
            "cannot hold a factor for each row, expected blocks",
            remedy="Merge into the checkpoint that is not quantised, then quantise it.",
        )
    return Fp8(dict(settings), tensors, (int(block[0]), int(block[1])))


@dataclass(frozen=True)
class Fp8:
    """See `Layout`.

    Attributes:
        config: the checkpoint's `quantization_config`.
        tensors: the checkpoint's tensors by name.
        block: outputs and inputs that share a scale.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    block: tuple[int, int]

    def has(self, path: str) -> bool:
        return f"{path}.weight_scale_inv" in self.tensors

    def shape(self, path: str) -> tuple[int, int]:
        outputs, inputs = self.tensors[f"{path}.weight"].shape
        return outputs, inputs

    def scaled(self, path: str, scale: Array) -> Mapping[str, Change]:
        self._check_blocks(path)
        compute = partial(self._by_rows, path, scale)
        return {f"{path}.weight_scale_inv": Computed.checked(compute)}

    def unscaled(self, path: str) -> Mapping[str, Change]:
        return self.scaled(path, np.broadcast_to(1.0, self.shape(path)[:1]))

    def settings(self) -> Mapping[str, Any]:
        return {
            **self.config,
            "weight_block_size": [1, self.block[1]],
            "scale_fmt": "float",
            "dequantize": True,
        }

    def entry(self, path: str, place: tuple[int, int]) -> tuple[float, float]:
        output, column = place
        at = output // self.block[0], column // self.block[1]
        scale, value = self.tensors[f"{path}.weight_scale_inv"][at], self.tensors[f"{path}.weight"]
        return scale * value[place], abs(scale) * float8_step(value[place])

    def _by_rows(self, path: str, scale: Array) -> Array:
        """Each row's scales, float32, times its factor."""
        blocks = self.tensors[f"{path}.weight_scale_inv"].read().astype(np.float32)
        rows = np.repeat(blocks, self.block[0], axis=0)[: len(scale)]
        return rounded_products(path, rows, scale[:, None])

    def _check_blocks(self, path: str) -> None:
        blocks = self.tensors[f"{path}.weight_scale_inv"].shape
        outputs, inputs = self.shape(path)
        expected = -(-outputs // self.block[0]), -(-inputs // self.block[1])
        if blocks != expected:
            raise BaseModelError(
                f"{path}: has scales of shape {list(blocks)}, expected {list(expected)} for blocks "
                f"of {self.block[0]} x {self.block[1]}"
            )
