"""Symmetric integers and scales of one weight matrix: weight = scale * integer."""

from typing import Literal, NamedTuple

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.rounding import rounded

Bits = Literal[4, 8]


class QuantisedWeight(NamedTuple):
    """The weight of a linear layer as integers and scales, outputs first.

    Attributes:
        integers: int8, [outputs, inputs].
        scales: in the graph's dtype, [outputs, blocks]; may be negative or zero.
        block_size: how many inputs share a scale, the last block may be shorter; 0: all of them.
    """

    integers: Array
    scales: Array
    block_size: int


def dequantise(weight: QuantisedWeight) -> Array:
    """What a runtime multiplies with: float64 [outputs, inputs], each product exact.

    A Conv1D's parameter is the transpose of it.
    """
    inputs = weight.integers.shape[1]
    scales = np.repeat(weight.scales.astype(np.float64), weight.block_size or inputs, axis=1)
    return weight.integers.astype(np.float64) * scales[:, :inputs]


def quantise_positive(weight: Array, bits: Bits, block_size: int) -> QuantisedWeight:
    """Quantise [outputs, inputs] with scales that are strictly positive, as TensorRT needs them.

    ONNX Runtime's quantisers cannot: they map the value of the largest magnitude to -2^(bits-1),
    which makes half of the scales negative, and have no int8 with DequantizeLinear. Here it is
    mapped to ±(2^(bits-1) - 1). Integers are those nearest for the scale as it is stored.

    Args:
        weight: floating point; its dtype is that of the scales.
        bits: of an integer.
        block_size: a divisor of the number of inputs; 0: one scale for each output.
    """
    largest = 2 ** (bits - 1) - 1
    outputs, inputs = weight.shape
    blocks = weight.astype(np.float64).reshape(outputs, -1, block_size or inputs)
    smallest = np.finfo(_float_type(weight)).smallest_normal
    wanted = np.maximum(np.abs(blocks).max(axis=2) / largest, float(smallest))
    scales = rounded(wanted, weight.dtype)
    integers = np.rint(blocks / scales.astype(np.float64)[..., None]).clip(-largest, largest)
    return QuantisedWeight(integers.astype(np.int8).reshape(weight.shape), scales, block_size)


def quantise_for_matmulnbits(weight: Array, bits: Bits, block_size: int) -> tuple[Array, Array]:
    """What MatMulNBits reads for a weight [inputs, outputs], by ONNX Runtime's own quantiser.

    Args:
        weight: float32 or float16.
        bits: of an integer.
        block_size: a power of two from 16 to 256; the last block is filled up with zeros.

    Returns:
        Packed integers, uint8 [outputs, blocks, bytes], and scales [outputs, blocks].
    """
    from onnxruntime.capi import _pybind_state as native

    inputs, outputs = weight.shape
    count, in_byte = -(-inputs // block_size), 8 // bits
    filled = np.pad(weight, ((0, count * block_size - inputs), (0, 0)))
    packed = np.zeros((outputs, count, block_size // in_byte), np.uint8)
    scales = np.zeros((outputs, count), weight.dtype)
    unused = np.zeros((outputs, -(-count // in_byte)), np.uint8)  # zero points, where not symmetric
    quantise = native.quantize_matmul_4bits if bits == 4 else native.quantize_matmul_8bits
    quantise(
        packed, np.ascontiguousarray(filled), scales, unused, block_size, outputs, inputs, True
    )
    return packed, scales


def unpack_matmulnbits(packed: Array, bits: int, inputs: int) -> Array:
    """The integers, int8 [outputs, inputs], that MatMulNBits reads from uint8 [outputs, …]."""
    rows = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        rows = np.stack([rows & 15, rows >> 4], axis=2).reshape(rows.shape[0], -1)
    centred = rows.astype(np.int16) - 2 ** (bits - 1)
    integers: Array = centred[:, :inputs].astype(np.int8)
    return integers


def _float_type(weight: Array) -> type[np.floating]:
    """float32 also stands for types that numpy has no limits of."""
    return np.float16 if weight.dtype == np.float16 else np.float32
