"""What is compared with what, so that a mistake about adapters cannot pass.

| case | holds when |
|---|---|
| parity | every output is within the allowed error of the oracle |
| effect | taking the scales away changes the oracle by far more than the candidate errs |
| padding | a row alone, unpadded, is within the allowed error of the same row in a padded batch |
| switching | adapter A after B gives what A gave before, bit for bit |
"""

from collections.abc import Sequence

import numpy as np

from propulsion_export.artifact import Runner, Tensors
from propulsion_export.decoding import alone
from propulsion_export.parity.comparison import OutputErrors, compare, has_positions, mismatch
from propulsion_export.parity.report import Check
from propulsion_export.parity.subject import Subject

# How many times larger than the candidate's error the adapter's effect has to be.
EFFECT_RATIO = 10.0


def judge(
    subjects: Sequence[Subject], inputs: Sequence[Tensors], candidate: Runner, dtype: str
) -> tuple[Check, ...]:
    """Run the candidate on every subject and every case that applies."""
    checks: list[Check] = []
    for subject in subjects:
        outputs = [candidate({**batch, **subject.feeds}) for batch in inputs]
        problem = next(
            filter(None, map(mismatch, subject.oracle, outputs)),
            None,
        )
        if problem:
            checks.append(Check("parity", subject.name, False, problem))
            continue
        errors = tuple(compare(inputs, subject.oracle, subject.reference, outputs, dtype))
        passed = all(output.passed for output in errors)
        checks.append(Check("parity", subject.name, passed, _worst(errors), errors))
        if subject.unscaled is not None:
            checks.append(_effect(subject, errors))
        if "attention_mask" in inputs[0]:
            checks.append(_padding(subject, inputs, candidate, errors))
    if len(subjects) > 1:
        checks.append(_switching(subjects, inputs[0], candidate))
    return tuple(checks)


def _worst(errors: Sequence[OutputErrors]) -> str:
    # A NaN margin sorts first: it is the worst there is.
    worst = min(errors, key=lambda e: e.margin if e.margin == e.margin else float("-inf"))
    return (
        f"{worst.output}: error {worst.error:.3g}, allowed {worst.allowed:.3g} (PyTorch itself "
        f"{worst.reference_error:.3g}); worst at {worst.worst}"
    )


def _effect(subject: Subject, errors: Sequence[OutputErrors]) -> Check:
    """Compare the most affected output's effect with the error there."""
    assert subject.unscaled is not None
    ratio, effect, against = 0.0, 0.0, 0.0
    for output in errors:
        change = max(
            float(np.abs(with_it[output.output] - without[output.output]).max(initial=0))
            for with_it, without in zip(subject.oracle, subject.unscaled, strict=True)
        )
        # The tolerance's floor stands in for an error of zero.
        error = max(output.error, output.allowed / EFFECT_RATIO)
        if error > 0 and change / error > ratio:
            ratio, effect, against = change / error, change, error
    return Check(
        "effect",
        subject.name,
        ratio >= EFFECT_RATIO,
        f"the scales change the outputs by {effect:.3g}, {ratio:.3g} times the error "
        f"{against:.3g}; "
        f"at least {EFFECT_RATIO:g} times is expected",
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
        found = candidate({**alone(batch, row), **subject.feeds})
        expected = {name: subject.oracle[0][name][row : row + 1] for name in allowed}
        expected |= {name: expected[name][:, real] for name in positional}
        if problem := mismatch(expected, found):
            return Check("padding", subject.name, False, f"row {row} alone: {problem}")
        for name, bound in allowed.items():
            error = float(np.abs(found[name].astype(np.float64) - expected[name]).max(initial=0))
            shares[f"row {row}, {name}"] = error / bound if bound else (error and float("inf"))
    # numpy's maximum, unlike Python's, is NaN as soon as one share is.
    where = list(shares)[int(np.argmax(list(shares.values())))]
    return Check(
        "padding",
        subject.name,
        bool(np.max(list(shares.values())) <= 1),
        f"rows alone use up to {shares[where]:.1%} of the allowed error ({where})",
    )


def _switching(subjects: Sequence[Subject], batch: Tensors, candidate: Runner) -> Check:
    first, second = subjects[0], subjects[-1]
    before = candidate({**batch, **first.feeds})
    candidate({**batch, **second.feeds})
    after = candidate({**batch, **first.feeds})
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    return Check(
        "switching",
        first.name,
        not changed,
        f"{first.name} after {second.name}: "
        + (f"{', '.join(changed)} changed" if changed else "bit for bit as before"),
    )
