"""The inputs on which an artifact is worst, kept with what both sides returned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.base_model.sentences.pipeline import SENTENCE
from propulsion_export.errors import PropulsionExportError
from propulsion_export.parity.comparison import hidden_positions, mismatch
from propulsion_export.parity.differences import counted_errors, rules_out
from propulsion_export.parity.evidence import Allowed, Evidence
from propulsion_export.parity.probes import hidden_rows
from propulsion_export.parity.probing import allowed_on_probes
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import alone, recomputing, replaying

Steps = Literal["once", "stepwise", "recomputed"]


@dataclass(frozen=True, eq=False)
class FailingRun:
    """One run of an artifact that is out of tolerance.

    Attributes:
        adapter: the state that was run, `base` for none.
        inputs: the batch, without an adapter's inputs.
        feeds: the adapter's inputs where the artifact has none of that name; else empty.
        oracle: PyTorch's outputs in float64.
        candidate: the artifact's.
        counted: which of the oracle's numbers count, by output: True at real positions.
        allowed: the largest error that passes, by output.
        share: the largest error in times of the allowed one; infinite for a NaN.
        steps: how a generative model was run: `stepwise` with its cache or `recomputed` without;
            `once` for other models.
    """

    adapter: str
    inputs: Tensors
    feeds: Tensors
    oracle: Tensors
    candidate: Tensors
    counted: Tensors
    allowed: Mapping[str, float]
    share: float
    steps: Steps


def worst_failing_run(
    evidence: Evidence, checks: Sequence[Check], allowed: Allowed
) -> FailingRun | None:
    """The run with the largest error in times of the allowed one, over all failing adapters.

    Batches are looked at as the case `parity` runs them, a generative model in one pass too; where
    all are within, rows alone, and then the inputs with a purpose.

    Returns:
        None if every run is within the tolerance.
    """
    failed = {check.adapter for check in checks if not check.passed}
    subjects = [s for s in evidence.subjects if s.name in failed and s.name in allowed]
    for runs in (_batches, _rows_alone, probe_runs):
        found = [
            one
            for subject in subjects
            for one in runs(evidence, subject, allowed[subject.name])
            if one.share > 1
        ]
        if found:
            return max(found, key=lambda one: one.share)
    return None


def _batches(
    evidence: Evidence, subject: Subject, allowed: Mapping[str, float]
) -> Iterator[FailingRun]:
    for steps, run in _runners(evidence):
        for batch, oracle in zip(evidence.batches, subject.oracle, strict=True):
            yield from _ran(evidence, subject, batch, oracle, run, steps, allowed)


def _rows_alone(
    evidence: Evidence, subject: Subject, allowed: Mapping[str, float]
) -> Iterator[FailingRun]:
    if "attention_mask" not in evidence.batches[0]:
        return
    steps, run = next(iter(_runners(evidence)))
    batch, oracle = evidence.batches[0], subject.oracle[0]
    for row, real in enumerate(batch["attention_mask"] == 1):
        shown = hidden_positions_of(batch, oracle)
        own = {
            name: values[row : row + 1, real] if name in shown else values[row : row + 1]
            for name, values in oracle.items()
        }
        yield from _ran(evidence, subject, alone(batch, row), own, run, steps, allowed)


def probe_runs(
    evidence: Evidence, subject: Subject, allowed: Mapping[str, float]
) -> Iterator[FailingRun]:
    """The runs of a state on every probe; rows that the mask hides do not count.

    Args:
        evidence: of the verdict.
        subject: the state.
        allowed: what the case `parity` allows.
    """
    if not evidence.probes:
        return
    probed = next(one for one in evidence.probed if one.name == subject.name)
    bounds = allowed_on_probes(evidence, probed, allowed)
    steps, run = next(iter(_runners(evidence)))
    for probe, oracle in zip(evidence.probes, probed.oracle, strict=True):
        yield from _ran(evidence, subject, probe.batch, oracle, run, steps, bounds)


def hidden_positions_of(batch: Tensors, oracle: Tensors) -> set[str]:
    """The outputs whose second axis counts the positions of the input."""
    shape = batch["attention_mask"].shape
    if "decoder_input_ids" in batch:
        return set()
    return {name for name, values in oracle.items() if values.shape[:2] == shape}


def _runners(evidence: Evidence) -> Iterator[tuple[Steps, Runner]]:
    if callable(evidence.candidate):
        yield "once", evidence.candidate
    else:
        yield "stepwise", replaying(evidence.candidate)
        yield "recomputed", recomputing(evidence.candidate)


def _ran(
    evidence: Evidence,
    subject: Subject,
    batch: Tensors,
    oracle: Tensors,
    run: Runner,
    steps: Steps,
    allowed: Mapping[str, float],
) -> Iterator[FailingRun]:
    """The run, unless its outputs cannot be compared."""
    try:
        found = run({**batch, **subject.feeds})
    except PropulsionExportError:
        return
    if mismatch(oracle, found):
        return
    names = [name for name in allowed if name != SENTENCE]
    counted = {name: _counted(name, batch, oracle) for name in names}
    shares = [_share(found[name], oracle[name], counted[name], allowed[name]) for name in names]
    recorded = subject.name == BASE_NAME or subject.name in evidence.artifact.list_adapters()
    yield FailingRun(
        adapter=subject.name,
        inputs=batch,
        feeds={} if recorded else subject.feeds,
        oracle={name: oracle[name] for name in names},
        candidate={name: np.asarray(found[name]) for name in names},
        counted=counted,
        allowed={name: allowed[name] for name in names},
        share=max(shares, default=0.0),
        steps=steps,
    )


def _counted(name: str, batch: Tensors, oracle: Tensors) -> Array:
    """Bool as an output: where its numbers count."""
    counted = ~hidden_positions(name, [batch], [oracle])[0]
    empty = hidden_rows(batch)
    if len(counted) == len(empty):
        counted[empty] = False
    return counted


def _share(found: Array, oracle: Array, counted: Array, allowed: float) -> float:
    """The largest error in times of the allowed one; infinite where an error is not finite.

    Nothing is expected of a row that does not count at all.
    """
    rows = counted.reshape(len(counted), -1).any(axis=1)
    errors = counted_errors(found[rows], oracle[rows], ~counted[rows], masked=rules_out(oracle))
    error = float(errors.max(initial=0))
    if not np.isfinite(error):
        return float("inf")
    return error / allowed if allowed else (float("inf") if error else 0.0)
