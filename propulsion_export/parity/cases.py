"""What is compared with what, so that a mistake about adapters cannot pass.

| case | holds when |
|---|---|
| parity | every output is within the allowed error of the oracle |
| effect | the scales change the candidate as much as the oracle, no more, no less |
| padding | a row alone, unpadded, is within the allowed error of the same row in a padded batch |
"""

from collections.abc import Sequence

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.errors import ToolError
from propulsion_export.parity.comparison import (
    FACTOR,
    Ceiling,
    OutputErrors,
    compare,
    has_positions,
    hidden_positions,
    mismatch,
)
from propulsion_export.parity.differences import differences
from propulsion_export.parity.pooling import parts_of
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import alone

# Share of an adapter's effect that may be lost, or added.
LOST = 0.1
Outputs = Sequence[Tensors]


def judge(
    subjects: Sequence[Subject],
    inputs: Sequence[Tensors],
    candidate: Runner,
    dtype: str,
    ceiling: Ceiling | None = None,
) -> tuple[Check, ...]:
    """Run the candidate on every subject and every case that applies.

    A row alone is not compared with the same row in a batch where the model itself depends on
    padding. A ceiling says how large an error of PyTorch itself counts, see `own_error`.
    """
    checks: list[Check] = []
    for subject in subjects:
        try:
            outputs = [candidate({**batch, **subject.feeds}) for batch in inputs]
        except ToolError as error:  # PyTorch runs on the same inputs
            checks.append(Check("parity", subject.name, False, str(error)))
            continue
        problem = next(
            filter(None, map(mismatch, subject.oracle, outputs)),
            None,
        )
        if problem:
            checks.append(Check("parity", subject.name, False, problem))
            continue
        errors = tuple(compare(inputs, subject.oracle, subject.reference, outputs, dtype, ceiling))
        passed = all(output.passed for output in errors)
        checks.append(Check("parity", subject.name, passed, _worst(errors), errors))
        if subject.unscaled is not None:
            checks.append(_effect(subject, inputs, errors, outputs))
        if "attention_mask" in inputs[0] and subject.padding_effect is None:
            checks.append(_padding(subject, inputs, candidate, errors))
    return tuple(checks)


def _worst(errors: Sequence[OutputErrors]) -> str:
    # A NaN margin sorts first: it is the worst there is.
    worst = min(errors, key=lambda e: e.margin if e.margin == e.margin else float("-inf"))
    return (
        f"{worst.output}: error {worst.error:.3g}, allowed {worst.allowed:.3g} (PyTorch itself "
        f"{worst.reference_error:.3g}); worst at {worst.worst}"
    )


def _effect(
    subject: Subject, inputs: Sequence[Tensors], errors: Sequence[OutputErrors], found: Outputs
) -> Check:
    """Check that the scales change the candidate as much as the oracle.

    The least-squares factor of the adapter's effect in what the candidate changes against the
    oracle without scales: 1 for a right candidate, 0 for one that dropped the adapter. Rounding
    averages out over the elements, so that an effect hardly larger than the error still shows.
    Outputs are weighted by their allowed error; an output whose effect is below PyTorch's own error
    is left out.
    """
    share, times = effect_share(subject, inputs, errors, found)
    detail = effect_in_words(share, times)
    passed = abs(share - 1) <= LOST
    return Check("effect", subject.name, passed, detail, effect_over_error=times)


def effect_share(
    subject: Subject,
    inputs: Sequence[Tensors],
    errors: Sequence[OutputErrors],
    found: Outputs,
    *,
    least: float = 1.0,
) -> tuple[float, float]:
    """The share of the scales' effect that has arrived, and the effect in times of the own error.

    Outputs are left out whose effect is at most `least` times PyTorch's own error; if all are, the
    share is 0.
    """
    assert subject.unscaled is not None
    arrived, whole, times = 0.0, 0.0, 0.0
    for output in errors:
        name, own = output.output, output.allowed / FACTOR
        hidden = hidden_positions(name, inputs, subject.oracle)
        size, change, effect = 0.0, 0.0, 0.0
        for part in parts_of(name, hidden, subject.oracle, subject.unscaled, found):
            scaled, unscaled, candidate = part.sides
            # Tokens that either rules out have no effect: the parity case compares where they are.
            left_out = part.hidden | (scaled == -np.inf) | (unscaled == -np.inf)
            expected = np.where(left_out, 0.0, _change(scaled, unscaled))
            size = float(np.maximum(size, np.abs(expected).max()))
            change += _product(_change(candidate, unscaled), expected)
            effect += float(np.vdot(expected, expected))
        times = max(times, size / own) if own else times
        if size > least * own:
            arrived += change / own**2
            whole += effect / own**2
    return (arrived / whole if whole else 0.0), times


def _change(scaled: Array, unscaled: Array) -> Array:
    """What scales change, float64; not finite where one of both is not."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        change: Array = np.subtract(scaled, unscaled, dtype=np.float64)
    return change


def _product(change: Array, effect: Array) -> float:
    """The sum of products; what is not finite counts only where there is an effect."""
    with np.errstate(invalid="ignore"):  # infinity times zero, infinity minus infinity
        total = float(np.vdot(change, effect))
        if np.isfinite(total):
            return total
        return float(np.where(effect == 0, 0, change * effect).sum())


def effect_in_words(share: float, times: float, whose: str = "PyTorch's own error") -> str:
    """What an effect case has found, and what it expects; `whose` error it is measured in."""
    return (
        f"{share:.1%} of what the scales change has arrived, {1 - LOST:.0%} to {1 + LOST:.0%} is "
        f"expected; the effect is {times:.3g} times {whose}"
    )


def _padding(
    subject: Subject,
    inputs: Sequence[Tensors],
    candidate: Runner,
    errors: Sequence[OutputErrors],
) -> Check:
    allowed = {output.output: output.allowed for output in errors}
    positional = {name for name in allowed if has_positions(name, inputs, subject.oracle)}
    shares: dict[str, float] = {}
    batch = inputs[0]
    for row, real in enumerate(batch["attention_mask"] == 1):
        try:
            found = candidate({**alone(batch, row), **subject.feeds})
        except ToolError as failure:
            return Check("padding", subject.name, False, f"row {row} alone: {failure}")
        expected = {name: subject.oracle[0][name][row : row + 1] for name in allowed}
        expected |= {name: expected[name][:, real] for name in positional}
        if problem := mismatch(expected, found):
            return Check("padding", subject.name, False, f"row {row} alone: {problem}")
        for name, bound in allowed.items():
            error = float(differences(found[name], expected[name]).max(initial=0))
            shares[f"row {row}, {name}"] = error / bound if bound else (error and float("inf"))
    # numpy's maximum, unlike Python's, is NaN as soon as one share is.
    where = list(shares)[int(np.argmax(list(shares.values())))]
    return Check(
        "padding",
        subject.name,
        bool(np.max(list(shares.values())) <= 1),
        f"rows alone use up to {shares[where]:.1%} of the allowed error ({where})",
    )
