"""How far apart neighbouring values of small floating-point types are."""

import math

# float4_e2m1 by its lowest three bits; the fourth is the sign (OCP MX specification 1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def float4(bits: int) -> float:
    """The value of a float4_e2m1 number, given by its four bits."""
    return -_E2M1[bits & 7] if bits & 8 else _E2M1[bits]


def float4_step(value: float) -> float:
    """The distance from a float4_e2m1 value to the next larger one."""
    return _step(value, mantissa=1, lowest=0)


def float8_step(value: float) -> float:
    """The distance from a float8_e4m3fn value to the next larger one."""
    return _step(value, mantissa=3, lowest=-6)


def float8_e5m2_step(value: float) -> float:
    """The distance from a float8_e5m2 value to the next larger one."""
    return _step(value, mantissa=2, lowest=-14)


def _step(value: float, mantissa: int, lowest: int) -> float:
    """Of a type with `mantissa` bits whose normal numbers start at 2**lowest."""
    exponent = math.frexp(value)[1] - 1 if value else lowest
    return 2.0 ** (max(exponent, lowest) - mantissa)
