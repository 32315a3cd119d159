"""Quantise a weight of the base model as that of a graph's node is."""

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.graph.quantisation.weights import (
    Bits,
    QuantisedWeight,
    quantise_for_matmulnbits,
    quantise_positive,
    unpack_matmulnbits,
)


def quantise(weight: Array, bits: Bits, block: int, *, positive: bool) -> QuantisedWeight:
    """Quantise a weight, outputs first.

    Args:
        weight: float32 or float16 [outputs, inputs].
        bits: 4 or 8.
        block: how many weights of a row share a scale; 0: all.
        positive: whether scales are above zero, as TensorRT needs them; ONNX Runtime's and
            onnxruntime-genai's quantiser makes half of them negative.
    """
    if positive:
        return quantise_positive(weight, bits, block)
    packed, scales = quantise_for_matmulnbits(np.ascontiguousarray(weight.T), bits, block)
    return QuantisedWeight(unpack_matmulnbits(packed, bits, weight.shape[1]), scales, block)
