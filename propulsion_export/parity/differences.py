"""How far outputs are apart, where minus infinity may be intended.

A generative model rules a token out by a logit of minus infinity. Where both sides have it there is
no difference; where one has it the difference is infinite. Plus infinity and NaN are never equal to
anything, not even to themselves.
"""

import numpy as np

from propulsion_export.adapters.scales import Array


def differences(found: Array, expected: Array) -> Array:
    """Absolute differences, float64 of the same shape; 0 where both are minus infinity.

    NaN, infinity on both sides, and infinity on one side give NaN or infinity.
    """
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        apart: Array = np.asarray(np.subtract(found, expected, dtype=np.float64))
    np.abs(apart, out=apart)
    if np.isnan(apart.max(initial=0)):
        apart[(found == -np.inf) & (expected == -np.inf)] = 0.0
    return apart


def counted_errors(found: Array, expected: Array, hidden: Array, *, masked: bool) -> Array:
    """The differences that count: 0 at hidden positions, NaN wherever one is not finite.

    What is not finite counts at hidden positions too, but for minus infinity that an output has
    where tokens are ruled out: the other side may have a number there, or padding.

    Args:
        found: one side.
        expected: the other.
        hidden: bool, as the sides or to be broadcast to them.
        masked: whether tokens are ruled out somewhere in the whole output, see `rules_out`.
    """
    errors = differences(found, expected)
    if not np.isfinite(errors.max(initial=0)):  # one that is not finite is the maximum
        harmless = np.isfinite(errors)
        hidden = hidden & (harmless | (found < np.inf) if masked else harmless)
        errors[~harmless] = np.nan
    if hidden.any():
        np.copyto(errors, 0.0, where=hidden)
    return errors


def rules_out(values: Array) -> bool:
    """Whether an output has minus infinity somewhere, and no NaN."""
    return bool(values.size) and bool(values.min() == -np.inf)


def without_ruled_out(values: Array) -> Array:
    """The values with 0 in place of minus infinity, which has no size."""
    return np.where(values == -np.inf, 0.0, values) if rules_out(values) else values
