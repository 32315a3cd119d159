"""The case `inputs`: what the artifact makes of the probes, see `probes`.

Errors are pooled over all inputs, those of the case `parity` and all probes, as far as they set
what is allowed: a single row must not condemn a right artifact. What must not exceed it is the
error on each probe.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.errors import ToolError
from propulsion_export.parity.comparison import OutputErrors, compare, mismatch
from propulsion_export.parity.evidence import Allowed, Evidence
from propulsion_export.parity.own_error import ceiling_of
from propulsion_export.parity.probes import Probe, seen_rows, without_hidden_rows
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject


def split(subjects: Iterable[Subject], count: int) -> tuple[list[Subject], list[Subject]]:
    """Subjects with the outputs for the first `count` batches, and with those for the others."""
    every = list(subjects)
    return (
        [_part(subject, slice(count)) for subject in every],
        [_part(subject, slice(count, None)) for subject in every],
    )


def judge_inputs(evidence: Evidence, allowed: Allowed) -> Iterator[Check]:
    """Check every state on every probe."""
    for subject in evidence.probed:
        if evidence.probes and subject.name in allowed:
            yield _check(evidence, subject, allowed[subject.name])


def _check(evidence: Evidence, subject: Subject, allowed: Mapping[str, float]) -> Check:
    compared: list[tuple[str, Sequence[OutputErrors]]] = []
    for place, probe in enumerate(evidence.probes):
        found = _errors(evidence, subject, probe, place)
        if isinstance(found, str):
            return Check("inputs", subject.name, False, f"{probe.purpose}: {found}")
        compared.append((probe.purpose, found))
    bounds = _bounds([found for _, found in compared], allowed)
    shares: dict[str, float] = {}
    for purpose, found in compared:
        share = _share(found, bounds)
        shares[purpose] = float(np.max([shares.get(purpose, 0.0), share]))
    # numpy's maximum, unlike Python's, is NaN as soon as one share is.
    worst = list(shares)[int(np.argmax(list(shares.values())))]
    detail = (
        f"{len(shares)} kinds of inputs use up to {shares[worst]:.1%} of the allowed error "
        f"({worst})"
    )
    passed = bool(np.max(list(shares.values())) <= 1)
    if not passed:
        detail += "".join(f"; {words}" for words in _unexplained(compared))
    return Check("inputs", subject.name, passed, detail)


def _unexplained(compared: Iterable[tuple[str, Sequence[OutputErrors]]]) -> Iterator[str]:
    """The first output for which PyTorch itself errs by more than rounding explains, in words."""
    beyond = (
        (purpose, one) for purpose, found in compared for one in found if not one.is_explained
    )
    for purpose, errors in islice(beyond, 1):
        yield (
            f"{errors.output}: PyTorch itself errs by {errors.reference_error:.3g} on {purpose}, "
            f"where at most {errors.explained:.3g} can be judged"
        )


def allowed_on_probes(
    evidence: Evidence, subject: Subject, allowed: Mapping[str, float]
) -> dict[str, float]:
    """What the case `inputs` allows of each output of a state.

    Args:
        evidence: of the verdict.
        subject: the state, as PyTorch computes it on the probes.
        allowed: what the case `parity` allows.
    """
    truths = [
        _compared(evidence, subject, probe, place, subject.oracle[place])
        for place, probe in enumerate(evidence.probes)
    ]
    return _bounds(truths, allowed)


def _errors(
    evidence: Evidence, subject: Subject, probe: Probe, place: int
) -> Sequence[OutputErrors] | str:
    """The errors of each output on a probe, or what is wrong with the outputs."""
    try:
        found = evidence.runner({**probe.batch, **subject.feeds})
    except ToolError as error:  # PyTorch runs on the same inputs
        return str(error)
    if problem := mismatch(subject.oracle[place], found):
        return problem
    return _compared(evidence, subject, probe, place, found)


def _compared(
    evidence: Evidence, subject: Subject, probe: Probe, place: int, found: Tensors
) -> Sequence[OutputErrors]:
    oracle, reference = subject.oracle[place], subject.reference[place]
    dtype = evidence.artifact.manifest.dtype
    return compare(
        [without_hidden_rows(probe).batch],
        [seen_rows(probe.batch, oracle)],
        [seen_rows(probe.batch, reference)],
        [seen_rows(probe.batch, found)],
        dtype,
        ceiling_of(evidence.base.model.config, dtype, probe.length),
    )


def _bounds(
    probes: Sequence[Sequence[OutputErrors]], allowed: Mapping[str, float]
) -> dict[str, float]:
    """What is allowed of each output over all inputs, those of the case `parity` among them."""
    bounds = dict(allowed)
    for errors in (errors for each in probes for errors in each):
        bounds[errors.output] = max(bounds.get(errors.output, 0.0), errors.allowed)
    return bounds


def _share(found: Sequence[OutputErrors], bounds: Mapping[str, float]) -> float:
    """The largest share of what is allowed that a probe's errors use."""
    return float(
        np.max(
            [
                errors.error / bound
                if (bound := bounds[errors.output])
                else errors.error and np.inf
                for errors in found
            ]
        )
    )


def _part(subject: Subject, batches: slice) -> Subject:
    unscaled = None if subject.unscaled is None else subject.unscaled[batches]
    return replace(
        subject,
        oracle=subject.oracle[batches],
        reference=subject.reference[batches],
        unscaled=unscaled,
    )
