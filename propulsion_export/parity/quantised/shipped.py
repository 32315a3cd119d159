"""Judge the graph of a quantised base model as it is shipped, whose runtime rounds activations.

The mistakes of an export are found in a variant of the graph that computes in floating point. What
is left to say of the graph as shipped is how far the rounding of the inputs of quantised layers
moves the outputs. It is measured on the base model; adapters may err as much, as a share of their
outputs.

That rounding moves outputs by percents, and an adapter can amplify it many times at single tokens
without being wrong. So it is pooled as a root mean square, which no single token decides.

| case | holds when |
|---|---|
| shipped parity | the outputs are within 4 times PyTorch's error or the base model's rounding |
| shipped effect | the scales change the outputs as much as the oracle, where that can be decided |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.cases import LOST, effect_in_words, effect_share
from propulsion_export.parity.comparison import (
    FACTOR,
    OutputErrors,
    compare,
    mismatch,
    with_runtime_error,
)
from propulsion_export.parity.reports.report import Check, NotRun, Rounding
from propulsion_export.parity.subject import Subject

# The outputs of every state of the model, batch by batch, by the name of the adapter.
OutputsByName = Mapping[str, Sequence[Tensors]]


@dataclass(frozen=True)
class ShippedVerdict:
    """What is known about a graph as shipped."""

    checks: tuple[Check, ...]
    not_run: tuple[NotRun, ...]
    rounding: tuple[Rounding, ...]


def judge_shipped(
    subjects: Sequence[Subject],
    inputs: Sequence[Tensors],
    found: OutputsByName,
    dtype: str,
    exact: Mapping[tuple[str, str], float],
) -> ShippedVerdict:
    """Judge the outputs of the graph as shipped.

    Args:
        subjects: what PyTorch computes with the dequantised weights.
        inputs: the batches.
        found: the outputs of the graph.
        dtype: the precision of the artifact.
        exact: the errors of the graph in floating point by adapter and output, root mean square;
            empty where there is none.
    """
    broken = [check for subject in subjects if (check := _broken(subject, found[subject.name]))]
    if broken:
        return ShippedVerdict(tuple(broken), (), ())
    errors = {
        subject.name: compare(inputs, subject.oracle, subject.reference, found[subject.name], dtype)
        for subject in subjects
    }
    # A folded graph has no state but its adapter's, so that its rounding is told, and not judged.
    measured = BASE_NAME if BASE_NAME in errors else subjects[0].name
    rounding = tuple(
        Rounding(measured, one.output, one.rms, exact.get((measured, one.output)), one.scale)
        for one in errors[measured]
    )
    if any(one.non_finite for one in errors[measured]):
        detail = "; ".join(f"{one.output}: {one.non_finite} NaN" for one in errors[measured])
        check = Check("shipped parity", measured, False, f"{detail} or infinite numbers")
        return ShippedVerdict((check,), (), rounding)
    largest = {one.output: _share(one.error, one.scale) for one in errors[measured]}
    pooled = {one.output: _share(one.rms, one.scale) for one in errors[measured]}
    results: list[Check | NotRun] = []
    for subject in subjects:
        own = errors[subject.name]
        if subject.name != measured:
            results.append(_parity(subject, _allowing(own, pooled)))
        if subject.unscaled is not None:
            results.append(_effect(subject, inputs, _allowing(own, largest), found[subject.name]))
    return ShippedVerdict(
        tuple(one for one in results if isinstance(one, Check)),
        tuple(one for one in results if isinstance(one, NotRun)),
        rounding,
    )


def _broken(subject: Subject, found: Sequence[Tensors]) -> Check | None:
    problems = filter(None, map(mismatch, subject.oracle, found))
    problem = next(problems, None)
    return None if problem is None else Check("shipped parity", subject.name, False, problem)


def _share(error: float, scale: float) -> float:
    return error / scale if scale else 0.0


def _allowing(errors: Sequence[OutputErrors], shares: Mapping[str, float]) -> list[OutputErrors]:
    return [with_runtime_error(one, shares[one.output]) for one in errors]


def _parity(subject: Subject, errors: Sequence[OutputErrors]) -> Check:
    worst = max(errors, key=_used)
    detail = (
        f"{worst.output}: error {worst.rms:.3g} (root mean square), allowed {worst.allowed:.3g} "
        f"({FACTOR:g} times the base model's own with rounded activations, as a share of "
        f"{worst.scale:.3g})"
    )
    return Check("shipped parity", subject.name, all(map(_passes, errors)), detail)


def _passes(errors: OutputErrors) -> bool:
    """False for NaN too."""
    return errors.rms <= errors.allowed


def _used(errors: OutputErrors) -> float:
    """How many times what is allowed the error is; NaN counts as most."""
    if not errors.rms:
        return 0.0
    used = errors.rms / errors.allowed if errors.allowed else np.inf
    return np.inf if np.isnan(used) else used


def _effect(
    subject: Subject,
    inputs: Sequence[Tensors],
    errors: Sequence[OutputErrors],
    found: Sequence[Tensors],
) -> Check | NotRun:
    """Check the effect where it exceeds what is allowed; a smaller one could be rounding alone."""
    share, times = effect_share(subject, inputs, errors, found, least=FACTOR)
    if times <= FACTOR:
        return NotRun(
            f"effect of {subject.name} in the graph as shipped",
            f"not decided: the scales change the outputs by {times:.3g} times the error of rounded "
            f"activations, more than {FACTOR:g} times are needed",
        )
    words = effect_in_words(share, times, "the error of rounded activations")
    return Check("shipped effect", subject.name, abs(share - 1) <= LOST, words)
