"""Judge the graph of a quantised base model as it is shipped, whose runtime rounds activations.

The mistakes of an export are found in a variant of the graph that computes in floating point. What
is left to say of the graph as shipped is whether it errs no more than rounded activations explain:
PyTorch over the same weights, with the inputs of quantised layers in 8 bits, says how much that is.

Such rounding moves outputs by percents, and an adapter can amplify it many times at single tokens
without being wrong. So errors are pooled as a root mean square, which no single token decides.

| case | holds when |
|---|---|
| shipped parity | the outputs err at most 4 times as much as PyTorch with rounded activations |
| shipped effect | the scales change the outputs as much as the oracle, where that can be decided |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.cases import LOST, effect_in_words, effect_share
from propulsion_export.parity.comparison import (
    FACTOR,
    OutputErrors,
    compare,
    mismatch,
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
    rounded: OutputsByName,
    dtype: str,
    exact: Mapping[tuple[str, str], float],
) -> ShippedVerdict:
    """Judge the outputs of the graph as shipped.

    Args:
        subjects: what PyTorch computes with the dequantised weights.
        inputs: the batches.
        found: the outputs of the graph.
        rounded: those of PyTorch with rounded activations, over the same weights.
        dtype: the precision of the artifact.
        exact: the errors of the graph in floating point by adapter and output, root mean square;
            empty where there is none.
    """
    broken = [check for subject in subjects if (check := _broken(subject, found[subject.name]))]
    if broken:
        return ShippedVerdict(tuple(broken), (), ())
    results: list[Check | NotRun] = []
    rounding: list[Rounding] = []
    for subject in subjects:
        own = rounded[subject.name]
        errors = compare(inputs, subject.oracle, own, found[subject.name], dtype)
        explained = compare(inputs, subject.oracle, subject.reference, own, dtype)
        results.append(_parity(subject, errors, explained))
        if subject.unscaled is not None:
            results.append(_effect(subject, inputs, errors, found[subject.name]))
        rounding += [
            Rounding(
                subject.name, one.output, one.rms, exact.get((subject.name, one.output)), one.scale
            )
            for one in errors
        ]
    return ShippedVerdict(
        tuple(one for one in results if isinstance(one, Check)),
        tuple(one for one in results if isinstance(one, NotRun)),
        tuple(rounding),
    )


def _broken(subject: Subject, found: Sequence[Tensors]) -> Check | None:
    problems = filter(None, map(mismatch, subject.oracle, found))
    problem = next(problems, None)
    return None if problem is None else Check("shipped parity", subject.name, False, problem)


def _parity(
    subject: Subject, errors: Sequence[OutputErrors], explained: Sequence[OutputErrors]
) -> Check:
    """Check root mean squares; what PyTorch rounds without rounded activations counts too."""
    allowed = [FACTOR * max(one.rms, one.reference_error) for one in explained]
    used = [_used(one.rms, most) for one, most in zip(errors, allowed, strict=True)]
    worst = int(np.argmax(used))
    detail = (
        f"{errors[worst].output}: error {errors[worst].rms:.3g} (root mean square), allowed "
        f"{allowed[worst]:.3g} ({FACTOR:g} times PyTorch's own with activations in 8 bits)"
    )
    return Check("shipped parity", subject.name, max(used) <= 1, detail)


def _used(error: float, allowed: float) -> float:
    """How many times what is allowed the error is; infinite for NaN."""
    if error == 0:
        return 0.0
    used = error / allowed if allowed else np.inf
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
    passed = abs(share - 1) <= LOST
    return Check("shipped effect", subject.name, passed, words, effect_over_error=times)
