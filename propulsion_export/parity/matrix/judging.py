"""The cases that compare what an artifact does with one adapter with what it does with others."""

from collections.abc import Iterator

from propulsion_export.artifacts.changing import is_changeable
from propulsion_export.artifacts.manifest import Manifest
from propulsion_export.artifacts.tensor_names import BANK_INPUT, PACKED_INPUTS
from propulsion_export.parity.evidence import Allowed, Evidence
from propulsion_export.parity.matrix.adding import check_added
from propulsion_export.parity.matrix.identity import check_identity
from propulsion_export.parity.matrix.probe import Probe
from propulsion_export.parity.matrix.switching import check_switching
from propulsion_export.parity.reports.report import Check


def judge_matrix(evidence: Evidence, allowed: Allowed) -> Iterator[Check]:
    """The cases `switching`, `identity` and `added`, bit for bit on one small batch.

    Nothing is checked of an artifact with one state, nor of states that the case `parity` could
    not compare.
    """
    states = [subject for subject in evidence.subjects if subject.name in allowed]
    if len(states) < 2:
        return
    probe = Probe.of(evidence)
    before = {state.name: probe.run(state.feeds) for state in states}
    yield from check_switching(states, probe, before)
    artifact = evidence.artifact
    if takes_adapters(artifact.manifest):
        yield from check_identity(artifact, evidence.base, probe, before)
    if is_changeable(artifact.manifest):
        yield from check_added(artifact, evidence.adapters, states, probe, before)


def takes_adapters(manifest: Manifest) -> bool:
    """Whether adapters are inputs, and not in the weights or built into an engine."""
    inputs = [*manifest.inputs, *(i for graph in manifest.graphs.values() for i in graph.inputs)]
    return bool({spec.name for spec in inputs} & {BANK_INPUT, *PACKED_INPUTS})
