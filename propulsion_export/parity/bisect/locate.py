"""Find the first module of a failing artifact that leaves its tolerance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.errors import PropulsionExportError
from propulsion_export.parity.bisect.culprit import Culprit, find_culprit
from propulsion_export.parity.bisect.matching import Errors, Pooled
from propulsion_export.parity.bisect.sides import CandidateSide, open_side, torch_sides
from propulsion_export.parity.evidence import Evidence, allowed_errors
from propulsion_export.parity.failing import probe_runs
from propulsion_export.parity.probes import hidden_rows
from propulsion_export.parity.reports.located import Located, Multiply
from propulsion_export.parity.reports.report import Check, NotRun
from propulsion_export.parity.states import states_of
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import alone, recomputing, replaying

# What no module is to blame for, or what a copy in floating point cannot show.
_NOT_NUMERIC = {
    "labels", "pooling", "sample", "weights", "shipped parity", "shipped effect", "price"
}  # fmt: skip
_MOST = 3  # adapters whose failures are located
_BINS = 512  # of channels, in a report
# Above this rows run one by one: every value of a graph is in memory at once.
_LARGE = 2**28
_Steps = Literal["in one pass", "step by step"]
_ENGINE = (
    "an engine shows no intermediate values; run `parity --bisect` on the ONNX export that it was "
    "built from"
)
_NO_OUTPUTS = "this case compares no outputs of a single adapter, in which a module could be wrong"
_ALL_RIGHT = (
    "every module whose output can be told in the artifact is within its tolerance on these inputs"
)


def locate_failures(
    evidence: Evidence, checks: Sequence[Check], runner: str, base: BaseModel
) -> tuple[tuple[Located, ...], tuple[NotRun, ...]]:
    """Locate the first failure of each adapter, of at most 3 adapters.

    Args:
        evidence: of the verdict.
        checks: what was found.
        runner: the runtime that ran the artifact.
        base: the base model, its weights as the oracle had them.

    Returns:
        The modules, and why there is none for a failure.
    """
    allowed, failures = allowed_errors(checks), _first_failures(evidence, checks)
    found = [
        _locate(_Bisection(evidence, base, subject, runner, allowed.get(subject.name, {})), check)
        for subject, check in failures[:_MOST]
    ]
    others = {check.adapter: check for check in reversed(checks) if not check.passed}
    for subject, _ in failures:
        others.pop(subject.name, None)
    found += [NotRun(_what(check), _NO_OUTPUTS) for check in others.values()]
    return (
        tuple(one for one in found if isinstance(one, Located)),
        tuple(one for one in found if isinstance(one, NotRun)),
    )


def _first_failures(evidence: Evidence, checks: Sequence[Check]) -> list[tuple[Subject, Check]]:
    subjects = {subject.name: subject for subject in evidence.subjects}
    failed: dict[str, Check] = {}
    for check in checks:
        if not check.passed and check.case not in _NOT_NUMERIC and check.adapter in subjects:
            failed.setdefault(check.adapter, check)
    return [(subjects[name], check) for name, check in failed.items()]


def _what(check: Check) -> str:
    return f"bisect of {check.case} of {check.adapter}"


def _locate(bisection: "_Bisection", check: Check) -> Located | NotRun:
    what = _what(check)
    if bisection.evidence.artifact.manifest.kind == "engine":
        return NotRun(what, _ENGINE)
    try:
        return bisection.run(check) or NotRun(what, _ALL_RIGHT)
    except PropulsionExportError as error:
        return NotRun(what, error.findings[0])


@dataclass(frozen=True)
class _Bisection:
    """One state of an artifact that has failed.

    `allowed`: what the case `parity` allows it, by output; empty where nothing could be compared.
    """

    evidence: Evidence
    base: BaseModel
    subject: Subject
    runner: str
    allowed: Mapping[str, float]

    def run(self, check: Check) -> Located | None:
        """The first wrong module in one pass, else in steps that read a cache."""
        steps: tuple[_Steps, ...] = ("in one pass",)
        if not callable(self.evidence.candidate):
            steps = ("in one pass", "step by step")
        side = open_side(self.evidence.artifact, self.runner, self.base)
        batches = [*self.evidence.batches, *self._failing_probes(check)]
        for each in steps:
            self._feed(side, each, batches)
            for graph, pooled in self._compare(side).items():
                dtype = self.evidence.artifact.manifest.dtype
                if (culprit := find_culprit(pooled, dtype)) is not None:
                    return self._told(check, graph, pooled, culprit, each)
            side.clear()
        return None

    def _failing_probes(self, check: Check) -> list[Tensors]:
        """The inputs of the case `inputs` on which the artifact is worst; none of another case."""
        if check.case != "inputs":
            return []
        runs = probe_runs(self.evidence, self.subject, self.allowed)
        worst = max(runs, key=lambda run: run.share, default=None)
        return [] if worst is None else [worst.inputs]

    def _feed(self, side: CandidateSide, steps: _Steps, batches: Sequence[Tensors]) -> None:
        candidate = side.candidate
        if callable(candidate):
            run: Runner = candidate
        else:
            run = (recomputing if steps == "in one pass" else replaying)(candidate)
        for batch in self._arranged(batches, steps):
            run({**batch, **self.subject.feeds})

    def _arranged(self, batches: Sequence[Tensors], steps: _Steps) -> Sequence[Tensors]:
        """Batches; as rows alone where the model or memory asks for it."""
        artifact = self.evidence.artifact
        apart = steps == "step by step" and artifact.manifest.pads_right
        apart |= pools_at_eos(self.base.model.config, self.base.task)
        if "attention_mask" in batches[0] and (apart or _is_large(self.base)):
            return [alone(batch, row) for batch in batches for row in _seen_rows(batch)]
        return batches

    def _compare(self, side: CandidateSide) -> dict[str, Pooled]:
        artifact = self.evidence.artifact
        states = states_of(artifact, self.base, self.evidence.adapters, ())
        adapter = next(each.attach for each in states if each.name == self.subject.name)
        dtype = artifact.manifest.dtype
        found: dict[str, Pooled] = {}
        for run, oracle, reference in torch_sides(self.base, side.runs, adapter, dtype):
            pooled = found.setdefault(run.graph, Pooled())
            pooled.add_(oracle, reference, run.values, side.places[run.graph], run.mask)
        return found

    def _told(
        self, check: Check, graph: str, pooled: Pooled, culprit: Culprit, steps: _Steps
    ) -> Located:
        dtype = self.evidence.artifact.manifest.dtype
        target, allowed = culprit.target, culprit.target.allowed(dtype)
        path, call = culprit.call
        kind = pooled.kinds[culprit.call]
        between = culprit.between
        located = Located(
            case=check.case,
            adapter=check.adapter,
            graph=graph if self.evidence.artifact.manifest.kind == "onnx" else "",
            path=path or "the model itself",
            kind=kind + (f", call {call + 1}" if call else ""),
            reads="itself" if between is None else between[0],
            error=float("nan"),
            allowed=allowed,
            reference_error=target.reference,
            multiply=self._multiply(culprit, dtype),
            steps=steps,
        )
        nearest = target.nearest() or _nearest_other(target.others)
        return _with_channels(located, [errors for _, errors in nearest]) if nearest else located

    def _multiply(self, culprit: Culprit, dtype: str) -> Multiply:
        if culprit.scaled_from is None:
            return "none"
        if self.evidence.artifact.manifest.mode == "folded":
            return "folded"
        return "wrong" if culprit.scaled_from.is_met(dtype) else "right"


def _is_large(base: BaseModel) -> bool:
    """Whether one batch of a model has so many values that its rows run one by one."""
    weights: int = sum(each.numel() * each.element_size() for each in base.model.parameters())
    return weights > _LARGE


def _seen_rows(batch: Tensors) -> Sequence[int]:
    return [int(row) for row in np.flatnonzero(~hidden_rows(batch))]


def _nearest_other(others: dict[str, Errors]) -> list[tuple[str, Errors]]:
    return sorted(others.items(), key=lambda item: item[1].total)[:1]


def _with_channels(located: Located, parts: Sequence[Errors]) -> Located:
    """The same with the errors of each channel."""
    largest = np.concatenate([part.largest for part in parts])
    products = np.concatenate([part.products for part in parts])
    squares = np.concatenate([part.squares for part in parts])
    worst = int(np.where(np.isnan(largest), np.inf, largest).argmax())
    per_bin = max(1, -(-largest.size // _BINS))
    bins = [float(largest[at : at + per_bin].max()) for at in range(0, largest.size, per_bin)]
    return replace(
        located,
        error=float(largest.max()),
        channels=largest.size,
        channels_off=int((~(largest <= located.allowed)).sum()),
        worst_channel=worst,
        factor=float(products[worst] / squares[worst]) if squares[worst] else None,
        per_bin=per_bin,
        channel_errors=tuple(bins),
    )
