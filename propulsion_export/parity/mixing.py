"""Parity of a bank in mixed batches, each row of which has its own adapter."""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.artifacts.tensor_names import IDS_INPUT
from propulsion_export.parity.comparison import hidden_positions
from propulsion_export.parity.evidence import Allowed, Evidence
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject


def judge_mixed(evidence: Evidence, allowed: Allowed) -> Iterator[Check]:
    """Check that every row of a mixed batch is within the allowed error of its adapter's oracle.

    The detail also says whether each row is bit for bit as in a batch of its adapter alone; shapes
    are the same there, so that kernels have no reason to compute in another way. As many batches
    are run as give every adapter a row. Only a bank has this case.
    """
    if evidence.artifact.manifest.mode == "bank" and allowed:
        yield mixed_rows(evidence.subjects, evidence.batches, evidence.runner, allowed)


def mixed_rows(
    subjects: Sequence[Subject], inputs: Sequence[Tensors], candidate: Runner, allowed: Allowed
) -> Check:
    """The case `mixed` of states with one adapter id each among their feeds."""
    judged = [subject for subject in subjects if subject.name in allowed]
    chosen = cycle(judged)
    rows = len(next(iter(inputs[0].values())))
    batches = max(len(inputs), math.ceil(len(judged) / rows))
    shares: list[float] = []
    exact = True
    for index in islice(cycle(range(len(inputs))), batches):
        batch = inputs[index]
        mixed = list(islice(chosen, len(next(iter(batch.values())))))
        found = candidate({**batch, **_feeds(mixed)})
        for row, subject in enumerate(mixed):
            errors = _errors(subject, inputs, index, row, found)
            shares += [_share(error, allowed[subject.name][name]) for name, error in errors]
            own = candidate({**batch, **subject.feeds})
            exact &= all(np.array_equal(found[name][row], own[name][row]) for name in found)
    worst = float(np.max(shares))  # NaN if there is one, which Python's own max() can lose
    return Check(
        "mixed",
        "all",
        worst <= 1,
        f"rows with an adapter each use up to {worst:.1%} of the allowed error; "
        f"{'bit for bit' if exact else 'not bit for bit'} as among rows of their adapter alone",
    )


def _feeds(subjects: Sequence[Subject]) -> Tensors:
    ids: Array = np.concatenate([subject.feeds[IDS_INPUT] for subject in subjects])
    return {**subjects[0].feeds, IDS_INPUT: ids}


def _errors(
    subject: Subject, inputs: Sequence[Tensors], batch: int, row: int, found: Tensors
) -> Iterator[tuple[str, float]]:
    """The largest error of each output in one row, without the positions that the mask hides."""
    for name in subject.oracle[batch]:
        hidden = hidden_positions(name, inputs, subject.oracle)[batch][row]
        error = np.abs(found[name][row].astype(np.float64) - subject.oracle[batch][name][row])
        yield name, float(np.where(hidden, 0.0, error).max(initial=0))


def _share(error: float, bound: float) -> float:
    return error / bound if bound else (error and math.inf)
