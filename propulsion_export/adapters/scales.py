"""The scale of one module, or of the weights of a mixture's experts."""

from typing import Any, Literal, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]
Side = Literal["output", "input"]


class Scale(NamedTuple):
    """The factors of one module's output (or of its input, in (IA)^3's feed-forward modules).

    `values`, float64, has shape [channels]. If all experts of a mixture share one parameter of
    three dimensions, the scale's path is that parameter's name and `values` has shape
    [experts, channels].
    """

    values: Array
    side: Side = "output"
