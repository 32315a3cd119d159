"""Judge the graph of a quantised base model as it is shipped, whose runtime rounds activations.

The mistakes of an export are found in an exact variant of the graph. What is left to say of the
graph as shipped is how far the rounding of the inputs of quantised layers moves the outputs. It is
measured on the base model; adapters may err as much, as a share of their outputs.

| case | holds when |
|---|---|
| shipped parity | the outputs are within 4 times PyTorch's error or the base model's rounding |
| shipped effect | the scales change the outputs as much as the oracle, where that can be decided |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        exact: the errors of its exact variant by adapter and output; empty where there is none.
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
        Rounding(measured, one.output, one.error, exact.get((measured, one.output)), one.scale)
        for one in errors[measured]
    )
    if any(one.non_finite for one in errors[measured]):
        detail = "; ".join(f"{one.output}: {one.non_finite} NaN" for one in errors[measured])
        check = Check("shipped parity", measured, False, f"{detail} or infinite numbers")
        return ShippedVerdict((check,), (), rounding)
    shares = {one.output: one.error / one.scale if one.scale else 0.0 for one in rounding}
    results: list[Check | NotRun] = []
    for subject in subjects:
        own = [with_runtime_error(one, shares[one.output]) for one in errors[subject.name]]
        if subject.name != measured:
            results.append(_parity(subject, own))
        if subject.unscaled is not None:
            results.append(_effect(subject, inputs, own, found[subject.name]))
    return ShippedVerdict(
        tuple(one for one in results if isinstance(one, Check)),
        tuple(one for one in results if isinstance(one, NotRun)),
        rounding,
    )


def _broken(subject: Subject, found: Sequence[Tensors]) -> Check | None:
    problems = filter(None, map(mismatch, subject.oracle, found))
    problem = next(problems, None)
    return None if problem is None else Check("shipped parity", subject.name, False, problem)


def _parity(subject: Subject, errors: Sequence[OutputErrors]) -> Check:
    worst = min(errors, key=lambda e: e.margin if e.margin == e.margin else float("-inf"))
    detail = (
        f"{worst.output}: error {worst.error:.3g}, allowed {worst.allowed:.3g} ({FACTOR:g} times "
        f"the base model's own with rounded activations, as a share of {worst.scale:.3g})"
    )
    return Check("shipped parity", subject.name, all(e.passed for e in errors), detail)


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
