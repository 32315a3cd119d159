"""What an adapter is made of: one scale for each module it touches."""

from typing import Any, Literal, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]
Side = Literal["output", "input"]


class Scale(NamedTuple):
    """What one module's output (or, in (IA)^3's feed-forward modules, its input) is multiplied by.

    `values` has shape [channels], float64.
    """

    values: Array
    side: Side = "output"
