"""A stored tensor times its factors, one run of elements after the other."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.tensor_files import DTYPES, Array
from propulsion_export.errors import AdapterError
from propulsion_export.merging.changes import Scaled
from propulsion_export.merging.narrow_products import NarrowProducts, scale_

BLOCK = 1 << 17  # elements; a run that is long enough for the time of a call not to count
_CHUNK = 1 << 16  # elements; what one step reads and writes of them stays in the L2 cache


class Products:
    """The products of one stored tensor, one run of its elements after the other.

    A product is computed in float64 and rounded once, to nearest, ties to even, or by a faster way
    with the same result. Runs may come in any order, of one object or several, from several threads
    at once: the buffers belong to the thread.

    Attributes:
        changed: whether the bytes of any product so far differ from what is stored (converted to
            the dtype that is written, where that is another one).
    """

    def __init__(self, change: Scaled) -> None:
        self.changed = False
        stored, written = change.stored.dtype, change.dtype or change.stored.dtype
        self._stored, self._written = DTYPES[stored], DTYPES[written]
        factors = np.asarray(change.factors, np.float64)
        shape = change.stored.shape or (1,)
        self._factors = np.broadcast_to(factors, shape)
        self._converts = bool((factors == 1).all())
        self._narrow = NarrowProducts.of(stored, written, factors, shape)

    def block(
        self,
        data: bytes | bytearray | memoryview | Array,
        first: int,
        into: Array | None = None,
    ) -> Array:
        """The products of consecutive elements, row-major; any number, `BLOCK` or more for speed.

        Args:
            data: the stored bytes of the elements.
            first: the number of the first of them in the tensor.
            into: uint8, with room for the bytes to write; default: a buffer of the calling thread,
                valid until this thread computes the next block, of this or another tensor.

        Returns:
            The bytes to write, uint8: the first of `into`.

        Raises:
            AdapterError: a product is not finite in the dtype to write. The finding starts with
                the element's place, such as `[3, 5]`, so that the tensor's name can be put before.
        """
        values = np.frombuffer(data, np.uint8).view(self._stored)
        size = values.size * self._written.itemsize
        room = _BUFFERS.products(size) if into is None else into[:size]
        products = room.view(self._written)
        with np.errstate(all="ignore"):
            if not self._by_float32(values, first, products):
                self._by_float64(values, first, products)
        if not (self.changed or self._converts):
            self.changed = not _same_bytes(values, products)
        return products.view(np.uint8)

    def _by_float32(self, values: Array, first: int, products: Array) -> bool:
        """Whether it could be computed this way."""
        if self._narrow is None:
            return False
        uncertain = []
        for run in _chunks(values.size):
            numbers = _BUFFERS.float32[: run.stop - run.start]
            halves = products[run].view(np.uint16)
            found = self._narrow.round(values[run], first + run.start, numbers, halves)
            if found is None:
                return False
            uncertain.append(found + run.start)
        places = np.concatenate(uncertain) if uncertain else np.empty(0, np.intp)
        wide = values[places].astype(np.float64) * self._factors_at(first + places)
        products[places] = rounded(wide, self._written)
        return True

    def _by_float64(self, values: Array, first: int, products: Array) -> None:
        for run in _chunks(values.size):
            wide = _BUFFERS.float64[: run.stop - run.start]
            np.copyto(wide, values[run])
            scale_(wide, first + run.start, self._factors)
            _round(wide, products[run])
            finite = np.isfinite(products[run])
            if not finite.all():
                position = run.start + int(finite.argmin())
                raise self._not_finite(float(values[position]), first + position)

    def _factors_at(self, places: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        return self._factors[np.unravel_index(places, self._factors.shape)]

    def _not_finite(self, value: float, place: int) -> AdapterError:
        where = [int(index) for index in np.unravel_index(place, self._factors.shape)]
        (factor,) = self._factors_at(np.array([place]))
        return AdapterError(
            f"{where}: {value} times the scale {factor} is not finite in {self._written.name}",
            remedy=range_remedy(self._written) if np.isfinite(value) else "",
        )


def range_remedy(dtype: np.dtype[Any]) -> str:
    """What helps where a product is too large for a dtype."""
    if dtype == np.float16:
        return "Write float32 or bfloat16 with --dtype."
    return "No dtype of a checkpoint holds it: train again with a lower rate."


class _Buffers(threading.local):
    """What a thread computes in; kept, since new pages cost more than the products."""

    def __init__(self) -> None:
        self.float64 = np.empty(_CHUNK, np.float64)
        self.float32 = self.float64.view(np.float32)[:_CHUNK]
        self._products = np.empty(0, np.uint8)

    def products(self, size: int) -> Array:
        """Uint8 [size]."""
        if self._products.size < size:
            self._products = np.empty(size, np.uint8)
        return self._products[:size]


_BUFFERS = _Buffers()


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, _CHUNK):
        yield slice(start, min(start + _CHUNK, size))


def _round(wide: Array, products: Array) -> None:
    if products.itemsize < np.dtype(np.float32).itemsize:
        products[...] = rounded(wide, products.dtype)
    else:
        np.copyto(products, wide, casting="unsafe")


def _same_bytes(values: Array, products: Array) -> bool:
    if values.dtype != products.dtype:
        values = rounded(values.astype(np.float64), products.dtype)
    return np.array_equal(values.view(np.uint8), products.view(np.uint8))
