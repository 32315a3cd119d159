"""Find the multiplications by a scale in a scaled graph."""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

# What an exporter puts between a scale and its Mul: another type or shape of the same numbers.
_SAME_NUMBERS = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class ScaleProduct:
    """A Mul by a scale.

    Attributes:
        node: the Mul.
        index: which of its two inputs holds the scale.
    """

    node: ir.Node
    index: int

    @property
    def scale(self) -> ir.Value:
        """The input that holds the scale."""
        return self._input(self.index)

    @property
    def other(self) -> ir.Value:
        """The input that is scaled."""
        return self._input(1 - self.index)

    def _input(self, index: int) -> ir.Value:
        value = self.node.inputs[index]
        assert value is not None
        return value


def products_by(scale: ir.Value) -> Iterator[ScaleProduct]:
    """Every Mul by `scale`, one for each call of the scaled module.

    Raises:
        PreconditionError: something else reads the scale.
    """
    for node, index in scale.uses():
        if node.op_type == "Mul":
            yield ScaleProduct(node, index)
        elif node.op_type in _SAME_NUMBERS and index == 0:
            yield from products_by(node.outputs[0])
        else:
            raise ir.passes.PreconditionError(
                f"{scale.name}: is read by a {node.op_type}, expected a Mul"
            )
