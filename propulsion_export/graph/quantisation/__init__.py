"""int4 and int8 weights: quantise the base model once, then fold adapters into its scales.

A graph is quantised while its scales are still multiplies, so that folded, switchable and bank
artifacts have the same integers. What is quantised: the weights of all linear layers, the language
model's head too (a tied one gets integers of its own). Embeddings, norms, biases, experts and what
adapters save whole stay in floating point.
"""

from propulsion_export.graph.quantisation.activations import QuantiseActivations
from propulsion_export.graph.quantisation.folding import FoldScales
from propulsion_export.graph.quantisation.passes import (
    QuantiseWeights,
    check_quantisable,
    needed_opset,
)
from propulsion_export.graph.quantisation.reading import Part, quantised_weights
from propulsion_export.graph.quantisation.weights import QuantisedWeight, dequantise

__all__ = [
    "FoldScales",
    "Part",
    "QuantiseActivations",
    "QuantiseWeights",
    "QuantisedWeight",
    "check_quantisable",
    "dequantise",
    "needed_opset",
    "quantised_weights",
]
