"""What an adapter is made of: one scale for each module, or expert weight, it touches."""

from typing import Any, Literal, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]
Side = Literal["output", "input"]


class Scale(NamedTuple):
    """What one module's output (or, in (IA)^3's feed-forward modules, its input) is multiplied by.

    `values`, float64, has shape [channels]. Where all experts of a mixture share one parameter of
    three dimensions, the scale's path is that parameter's and `values` has shape
    [experts, channels].
    """

    values: Array
    side: Side = "output"
