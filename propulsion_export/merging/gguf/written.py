"""What a merge writes for one tensor of a GGUF file."""

from dataclasses import dataclass, field

from propulsion_export.base_model.gguf.header import TensorPlace
from propulsion_export.base_model.tensor_files import Array


@dataclass(frozen=True)
class Written:
    """A tensor as it is written: stored numbers, their products, or new ones.

    Attributes:
        name: in the file that is written.
        place: its shape and type, and where the stored numbers lie.
        factors: what they are multiplied by, float64, with as many axes as the tensor, each 1 or
            the tensor's own; only one is its own, or all but the last. None: they are copied.
        channels: which channel of the adapter each factor is, in the shape of the factors.
        given: new numbers in their place, float64.
    """

    name: str
    place: TensorPlace
    factors: Array | None = field(default=None, repr=False)
    channels: Array | None = field(default=None, repr=False)
    given: Array | None = field(default=None, repr=False)
