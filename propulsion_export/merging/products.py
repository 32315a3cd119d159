"""A stored tensor times its factors, one run of elements after the other."""


import numpy as np
import numpy.typing as npt

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, Array
from propulsion_export.errors import AdapterError
from propulsion_export.merging.changes import Scaled

BLOCK = 1 << 17  # elements; the buffers of a block this long stay in the L2 cache


class Products:
    """The products of one stored tensor, one run of its elements after the other.

    A product is computed in float64 and rounded once, to nearest, ties to even. Runs may come in
    any order and from several threads at once: an object has no buffers, each thread has its own.

    Attributes:
        changed: whether any product so far differs from the value that is stored.
    """

    def __init__(self, change: Scaled) -> None:
        self._change = change
        self._from = DTYPES[change.stored.dtype]
        self._to = DTYPES[change.dtype or change.stored.dtype]
        self.changed = False

    def block(self, data: bytes | bytearray | memoryview | Array, first: int) -> Array:
        """The products of consecutive elements, row-major; fastest for about `BLOCK` of them.

        Args:
            data: the stored bytes of the elements.
            first: the number of the first of them in the tensor.

        Returns:
            The bytes to write, uint8, in a buffer of the calling thread; valid until this thread
            computes the next block, of this or another tensor.

        Raises:
            AdapterError: a product is not finite in the dtype to write. The finding starts with
                the element's place, such as `[3, 5]`, so that the tensor's name can be put before.
        """
        values = np.frombuffer(data, np.uint8).view(self._from)
        wide = values.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            products = rounded(wide * self._factors(first, values.size), self._to)
        finite = np.isfinite(products)
        if not finite.all():
            raise self._not_finite(wide, first, int(finite.argmin()))
        self.changed = self.changed or bool((products != values.astype(self._to)).any())
        return products.view(np.uint8)

    def _factors(self, first: int, count: int) -> npt.NDArray[np.float64]:
        spread = np.broadcast_to(self._change.factors, self._change.stored.shape)
        return np.asarray(spread.flat[first : first + count], np.float64)

    def _not_finite(self, wide: Array, first: int, position: int) -> AdapterError:
        place = np.unravel_index(first + position, self._change.stored.shape)
        (factor,) = self._factors(first + position, 1)
        return AdapterError(
            f"{[int(index) for index in place]}: {float(wide[position])} times the scale "
            f"{float(factor)} is not finite in {self._to.name}",
            remedy="Write float32 or bfloat16 with --dtype.",
        )
