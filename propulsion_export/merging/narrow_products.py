"""Products rounded to 16 bits by way of float32, and which of them that way may get wrong.

The product that counts is that of float64. A factor rounded to float32 is off by at most 2^-24 of
itself, which is less than a unit in the last place of the float32 product; rounding the product
adds half a unit, and the float64 product is within 2^-29 units of the exact one. So the two are
less than two units apart, on the same side of every midpoint of two 16-bit numbers that is further
away than that, and round to the same number. Among subnormal float32 numbers, whose unit is fixed,
they are at most one unit apart, as long as the factor is a normal number. The few products that are
within two units of a midpoint are found and left to the caller: 8e-5 of all in bfloat16, 6e-4 in
float16. Where the factors have so few bits that every product is a float32 number, many may lie on
a midpoint, but then they are known exactly, and rounded to the even neighbour.

A bfloat16 is the upper half of a float32. A float16 divided by 2^112 is a float32 with the same
exponent field and the same significand, subnormals of one being subnormals of the other. So both
are rounded by adding half a step to the bits of a float32 and dropping the lowest ones. (This needs
a processor that does not flush subnormal numbers to zero, as numpy does.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.tensor_files import Array

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint32]
Halves = npt.NDArray[np.uint16]
Places = npt.NDArray[np.intp]

_DIGITS, _LOWEST = 24, -149  # of float32: significant bits; the exponent of its smallest number
_MARGIN = 2  # units of float32
_DIVISOR = 2.0**112  # of float16: the offsets of the exponent fields are 15 and 127


@dataclass(frozen=True)
class Widening:
    """How stored numbers become float32 ones.

    Attributes:
        write: writes them.
        digits: how many significant bits they have.
        lowest: they are multiples of 2 to this power.
        divisor: what they are divided by, a power of two.
        limit: magnitudes of this and more are what infinity and NaN have become.
    """

    write: Callable[[Array, Floats], None]
    digits: int
    lowest: int
    divisor: float = 1.0
    limit: float | None = None

    def is_exact(self, factors: npt.NDArray[np.float64]) -> bool:
        """Whether each product of a stored number and one of these is a float32 number.

        A product that is too large for one is infinity.
        """
        digits = np.ldexp(np.frexp(factors)[0], _DIGITS - self.digits)
        multiple = np.ldexp(factors, self.lowest - _LOWEST)
        return all(bool((values == np.rint(values)).all()) for values in (digits, multiple))


@dataclass(frozen=True)
class Narrowing:
    """How float32 numbers become 16-bit ones.

    Attributes:
        drop: writes the rounded bits without the lowest `dropped`; destroys them.
        dropped: the number of bits.
        limit: magnitudes of this and more may become infinity or NaN.
        divisor: what the float32 numbers are divided by, a power of two.
    """

    drop: Callable[[Bits, Halves], None]
    dropped: int
    limit: float
    divisor: float = 1.0


def _widen_directly(stored: Array, numbers: Floats) -> None:
    np.copyto(numbers, stored)


def _widen_float16(stored: Array, numbers: Floats) -> None:
    bits = numbers.view(np.int32)
    np.copyto(bits, stored.view(np.int16))
    bits <<= 13
    bits &= ~0x70000000  # the copies of the sign


def _drop_for_bfloat16(bits: Bits, halves: Halves) -> None:
    bits >>= 16
    np.copyto(halves, bits, casting="unsafe")


def _drop_for_float16(bits: Bits, halves: Halves) -> None:
    signs = bits >> 31
    signs <<= 15
    bits <<= 1
    bits >>= 14
    bits |= signs
    np.copyto(halves, bits, casting="unsafe")


# By the format's name of the stored dtype.
WIDENINGS = {
    "BF16": Widening(_widen_directly, digits=8, lowest=-133),
    "F32": Widening(_widen_directly, digits=_DIGITS, lowest=_LOWEST),
    "F16": Widening(_widen_float16, 11, -24 - 112, _DIVISOR, 65520 / _DIVISOR),
}
# By that of the dtype to write. Numbers below the limits round to finite ones even if they are two
# units too low.
NARROWINGS = {
    "BF16": Narrowing(_drop_for_bfloat16, 16, 2.0**128 - 2.0**119 - 2.0**110),
    "F16": Narrowing(_drop_for_float16, 13, 65519 / _DIVISOR, _DIVISOR),
}


@dataclass(frozen=True)
class NarrowProducts:
    """The products of stored numbers and factors as 16-bit numbers.

    Attributes:
        widening: of the stored dtype.
        narrowing: of the dtype to write.
        factors: float32, of the tensor's shape; times the quotient of the divisors.
        exact: whether all products are float32 numbers.
    """

    widening: Widening
    narrowing: Narrowing
    factors: Floats
    exact: bool

    @classmethod
    def of(
        cls, stored: str, written: str, factors: npt.NDArray[np.float64], shape: tuple[int, ...]
    ) -> "NarrowProducts | None":
        """None where a dtype, or a factor that is too small, asks for float64.

        Args:
            stored: the format's name of the stored dtype.
            written: that of the dtype to write.
            factors: can be broadcast to `shape`.
            shape: of the tensor.
        """
        if stored not in WIDENINGS or written not in NARROWINGS:
            return None
        widening, narrowing = WIDENINGS[stored], NARROWINGS[written]
        exact = factors * (widening.divisor / narrowing.divisor)
        with np.errstate(over="ignore", under="ignore"):
            near = exact.astype(np.float32)
        # Products with an infinite one are beyond every limit.
        normal = np.abs(near) >= np.finfo(np.float32).tiny
        if not (normal | (factors == 0)).all():
            return None
        return cls(widening, narrowing, np.broadcast_to(near, shape), widening.is_exact(exact))

    def round(self, values: Array, first: int, numbers: Floats, halves: Halves) -> Places | None:
        """Write products of a run of elements, in memory that stays in the cache if it is short.

        Args:
            values: [count], the stored numbers.
            first: the number of the first of them in the tensor, row-major.
            numbers: float32 [count], to compute in.
            halves: uint16 [count], what is written.

        Returns:
            The positions of products that are uncertain, whose `halves` mean nothing; None if any
            product may not be finite.
        """
        self.widening.write(values, numbers)
        if self.widening.limit and not _magnitude(numbers) < self.widening.limit:
            return None
        scale_(numbers, first, self.factors)
        if not _magnitude(numbers) < self.narrowing.limit:
            return None
        return self._narrow(numbers.view(np.uint32), halves)

    def _narrow(self, bits: Bits, halves: Halves) -> Places:
        dropped, uncertain = self.narrowing.dropped, np.empty(0, np.intp)
        if self.exact:
            odd = bits >> dropped
            odd &= 1
            bits += odd
            bits += (1 << dropped - 1) - 1
        else:
            bits += (1 << dropped - 1) + _MARGIN
            np.copyto(halves, bits, casting="unsafe")
            halves &= (1 << dropped) - 1
            uncertain = np.flatnonzero(halves <= 2 * _MARGIN)
        self.narrowing.drop(bits, halves)
        return uncertain


def scale_(numbers: Array, first: int, factors: Array) -> None:
    """Multiply a run of a tensor's elements in place, without a factor for each in memory.

    Args:
        numbers: [count], of any floating-point dtype; elements of the tensor, row-major.
        first: the number of the first of them in the tensor.
        factors: of the tensor's shape; usually a view that repeats few of them.
    """
    if factors.ndim == 1:
        numbers *= factors[first : first + numbers.size]
        return
    size = math.prod(factors.shape[1:])
    row, offset = divmod(first, size)
    head = min(-first % size, numbers.size)
    if head:
        scale_(numbers[:head], offset, factors[row])
        row += 1
    rows = (numbers.size - head) // size
    whole = numbers[head : head + rows * size].reshape(rows, *factors.shape[1:])
    whole *= factors[row : row + rows]
    if head + whole.size < numbers.size:
        scale_(numbers[head + whole.size :], 0, factors[row + rows])


def _magnitude(numbers: Floats) -> float:
    """The largest; NaN if there is one."""
    return float(max(numbers.max(), -numbers.min()))
