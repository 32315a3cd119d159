"""Quantise a graph by a scheme, weights and activations."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.graph.quantisation.activations import QuantiseActivations
from propulsion_export.graph.quantisation.passes import (
    QuantiseWeights,
    check_quantisable,
    needed_opset,
)


@dataclass(frozen=True)
class Quantisation:
    """How the graphs of an export are quantised.

    Attributes:
        scheme: bits, form and block size.
        largest: the largest magnitude that each linear layer reads, by its weight's name, see
            `calibration.measure_inputs`; only where activations are quantised.
    """

    scheme: QuantizationEntry
    largest: Mapping[str, float] | None = None

    @property
    def opset(self) -> int:
        """The lowest opset that the graphs may be traced with."""
        return needed_opset(self.scheme)

    def apply_(self, program: ir.Model, keep: Collection[str]) -> None:
        """Quantise a graph with multiplies, in place, but not the parameters in `keep`.

        Raises:
            UsageError: the block size does not divide a layer's inputs (form `qdq`).
            BaseModelError: there is nothing to quantise.
        """
        check_quantisable(program, self.scheme, keep)
        QuantiseWeights(self.scheme, keep)(program)
        if self.largest is not None:
            QuantiseActivations(self.largest)(program)
