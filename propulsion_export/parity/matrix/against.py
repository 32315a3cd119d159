"""Compare two artifacts of one base model and adapter, such as a merged checkpoint and an engine.

Each of them may be as far from the oracle as the case `parity` allows, so their outputs may be as
far apart as both together. The outputs of the other one are compared with no oracle: that this
artifact passes, and that they agree on all of its inputs, says what the other computes. Its tables,
tokenizer, labels and settings are not looked at: its own verdict does that.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.artifacts.manifest import Manifest
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import ArtifactError, ToolError, UnavailableError, UsageError
from propulsion_export.graph.signature import check_signature
from propulsion_export.parity.comparison import compare, hidden_positions
from propulsion_export.parity.differences import differences
from propulsion_export.parity.embeddings import embedding
from propulsion_export.parity.evidence import Allowed, Evidence
from propulsion_export.parity.forwards import Compute
from propulsion_export.parity.probes import Limits, seen_rows, without_hidden_rows
from propulsion_export.parity.probing import allowed_on_probes
from propulsion_export.parity.quantised.outputs import compute_outputs
from propulsion_export.parity.quantised.verdict import exact_candidate
from propulsion_export.parity.reports.report import Check, NotRun
from propulsion_export.parity.states import feeds_of
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import replaying
from propulsion_export.runners.opening import choose_runner, open_candidate


@dataclass(frozen=True)
class Other:
    """Another artifact to compare with.

    Attributes:
        artifact: the other artifact.
        names: what it calls each state that both have, by the name here.
    """

    artifact: Artifact
    names: Mapping[str, str]

    @property
    def dtype(self) -> str:
        """The precision of the other artifact."""
        return self.artifact.manifest.dtype

    @property
    def label(self) -> str:
        """Where it is, and what it is."""
        manifest = self.artifact.manifest
        return f"{self.artifact.shown} ({manifest.kind}, {manifest.mode}, {manifest.dtype})"


def read_other(own: Artifact, directory: Path) -> Other:
    """Read an artifact and find what it shares with `own`.

    Raises:
        UsageError: it is the same directory.
        ArtifactError: it is damaged, of another task or base model, quantised otherwise, or has no
            adapter of `own`.
    """
    other = Artifact.read(directory)
    if other.directory.resolve() == own.directory.resolve():
        raise UsageError(
            f"--against: {directory} is the artifact itself, expected another one",
            remedy="Leave it out.",
        )
    check_signature(other)
    ours, theirs = own.manifest, other.manifest
    findings = []
    if ours.task != theirs.task:
        findings.append(f"is for {theirs.task}, expected {ours.task}")
    if difference := ours.base.fingerprint.difference(theirs.base.fingerprint):
        findings.append(f"was made from another base model ({difference})")
    if _weights(ours) != _weights(theirs):
        findings.append(f"has {_weights(theirs)} weights, expected {_weights(ours)} ones")
    names = _shared(own, other)
    if not names:
        findings.append("has no adapter of the same digest, expected one at least")
    if findings:
        raise ArtifactError(
            *(f"--against: {directory}: {finding} as {own.directory}" for finding in findings),
            remedy="Compare two exports of the same adapter.",
        )
    if _has_base(ours) and _has_base(theirs):
        names[BASE_NAME] = BASE_NAME
    return Other(other, names)


def references_at(
    others: Sequence[Other],
    own: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    compute: Compute,
) -> dict[str, list[Subject]]:
    """What PyTorch computes in every state at other precisions than the artifact's, by dtype.

    The model of `base` keeps its values.
    """
    references = {}
    for dtype in sorted({other.dtype for other in others} - {own.manifest.dtype}):
        with _values_kept(base.model):
            references[dtype] = compute_outputs(own, base, adapters, batches, compute, dtype)
    return references


@contextmanager
def _values_kept(model: Any) -> Iterator[None]:
    """Give a model its own values again after it was converted to another dtype."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, values in parameters:
            parameter.data = values
        for module, own in buffers:
            module._buffers |= own


def judge_against(
    evidence: Evidence,
    allowed: Allowed,
    other: Other,
    references: Mapping[str, Sequence[Subject]],
    *,
    trust_remote_code: bool = False,
) -> Iterator[Check | NotRun]:
    """The case `against` for every state that both artifacts have.

    Args:
        evidence: of the artifact that is judged.
        allowed: what it may err.
        other: the artifact to compare with.
        references: see `references_at`.
        trust_remote_code: run code that the other artifact brings.
    """
    states = [s for s in evidence.subjects if s.name in other.names and s.name in allowed]
    try:
        run, name = _open(evidence, other.artifact, trust_remote_code=trust_remote_code)
    except UnavailableError as error:
        yield NotRun(f"against {other.label}", str(error))
        return
    if not states:
        yield NotRun(f"against {other.label}", "none of what both have could be judged here")
    for state in states:
        parts = _parts(evidence, allowed[state.name], other, state, references)
        if name == "reference":  # it takes minutes for what others compute in a second
            parts = [replace(parts[0], batches=parts[0].batches[:1])]
        found = [_compared(evidence, state, other, part, run) for part in parts]
        yield next((check for check in found if not check.passed), found[0])


def _compared(
    evidence: Evidence, state: Subject, other: Other, part: "_Part", run: Runner
) -> Check:
    """Run both artifacts on some inputs and compare them."""
    feeds = feeds_of(other.artifact, other.names[state.name], {})
    try:
        ours = [evidence.runner({**batch, **state.feeds}) for batch in part.batches]
        theirs = [run({**batch, **feeds}) for batch in part.batches]
    except ToolError as error:  # this artifact's own failure is another case's
        return Check("against", state.name, False, f"{other.label}: {error}")
    return _agreement(evidence, state, other, part, (ours, theirs))


def _open(evidence: Evidence, artifact: Artifact, *, trust_remote_code: bool) -> tuple[Runner, str]:
    """The other artifact as a runner of whole sequences, and the name of its runtime."""
    name = choose_runner(artifact, "auto")
    shipped = open_candidate(artifact, name, trust_remote_code=trust_remote_code)
    candidate = exact_candidate(artifact, name, shipped, trust_remote_code=trust_remote_code)
    if candidate is None:
        raise UnavailableError(f"{name} rounds activations, which hides what the weights do")
    if not callable(candidate):
        return replaying(candidate), name
    pipeline = read_sentence_pipeline(artifact.directory)
    embeds = TASKS[evidence.base.task].prediction == "embedding" and pipeline is not None
    return (embedding(candidate, pipeline) if embeds and pipeline else candidate), name


@dataclass(frozen=True)
class _Part:
    """Some of the inputs of a verdict.

    Attributes:
        batches: the inputs.
        bounds: what each of the artifacts may err on them, by output.
        purposeful: whether they are for a purpose each, see `probes`.
    """

    batches: Sequence[Tensors]
    bounds: Mapping[str, tuple[float, float]]
    purposeful: bool = False


def _parts(
    evidence: Evidence,
    allowed: Mapping[str, float],
    other: Other,
    state: Subject,
    references: Mapping[str, Sequence[Subject]],
) -> list[_Part]:
    """The everyday inputs, and those probes that the other artifact takes too."""
    count = len(evidence.batches)
    found = [one.oracle for one in references.get(other.dtype, ()) if one.name == state.name]
    at_other = found[0] if found else None
    everyday = {name: (bound, bound) for name, bound in allowed.items()}
    if at_other is not None:
        errors = compare(
            evidence.batches, state.oracle, at_other[:count], state.oracle, other.dtype
        )
        everyday = {each.output: (allowed[each.output], each.allowed) for each in errors}
    first = _Part(evidence.batches, everyday)
    limits = Limits.of(other.artifact.manifest)
    taken = [n for n, probe in enumerate(evidence.probes) if limits.takes(probe.batch)]
    if not taken:
        return [first]
    (probed,) = [one for one in evidence.probed if one.name == state.name]
    here = allowed_on_probes(evidence, probed, allowed)
    batches = [without_hidden_rows(evidence.probes[n]).batch for n in taken]
    purposeful = {name: (bound, bound) for name, bound in here.items()}
    if at_other is not None:
        truth, reference = (
            [seen_rows(evidence.probes[n].batch, side[n]) for n in taken]
            for side in (probed.oracle, at_other[count:])
        )
        errors = compare(batches, truth, reference, truth, other.dtype)
        purposeful = {
            each.output: (here[each.output], max(each.allowed, everyday[each.output][1]))
            for each in errors
        }
    return [first, _Part(batches, purposeful, purposeful=True)]


def _agreement(
    evidence: Evidence,
    state: Subject,
    other: Other,
    part: _Part,
    outputs: tuple[Sequence[Tensors], Sequence[Tensors]],
) -> Check:
    """Check that the outputs of both artifacts for some batches are no further apart."""
    ours, theirs = outputs
    labelled = TASKS[evidence.base.task].labelled_output
    used: dict[str, float] = {}
    findings: dict[str, str] = {}
    for name, (here, there) in part.bounds.items():
        if not all(name in each for each in theirs):
            findings[name], used[name] = f"{name}: {other.label} does not return it", math.inf
            continue
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
        pairs = [_same_labels(*pair) for pair in pairs] if name == labelled else pairs
        hidden = hidden_positions(name, part.batches, [{name: found} for found, _ in pairs])
        distance = _distance(pairs, hidden)
        used[name] = distance / (here + there) if here + there else distance and math.inf
        findings[name] = (
            f"{name}: differs from {other.label} by {distance:.3g}, allowed "
            f"{here + there:.3g} ({here:.3g} here and {there:.3g} there)"
        )
    worst = list(used)[int(np.argmax(list(used.values())))]  # NaN is the worst
    called = other.names[state.name]
    words = ", on inputs for a purpose" if part.purposeful else ""
    words += "" if called == state.name else f", called {called} there"
    return Check("against", state.name, used[worst] <= 1, findings[worst] + words)


def _distance(pairs: Sequence[tuple[Array, Array]], hidden: Sequence[Array]) -> float:
    """The largest difference where nothing is hidden; infinite where shapes differ."""
    if any(one.shape != another.shape for one, another in pairs):
        return math.inf
    parts = zip([differences(*pair) for pair in pairs], hidden, strict=True)
    return float(np.max([values[~unseen].max(initial=0) for values, unseen in parts]))


def _same_labels(one: Array, another: Array) -> tuple[Array, Array]:
    """Scores of the labels that both have; the others are padding for adapters with more."""
    count = min(one.shape[-1], another.shape[-1])
    return one[..., :count], another[..., :count]


def _shared(own: Artifact, other: Artifact) -> dict[str, str]:
    """What another artifact calls each adapter of `own` that it has too."""
    theirs = {entry.digest: name for name, entry in other.list_adapters().items()}
    entries = own.list_adapters().items()
    return {name: theirs[entry.digest] for name, entry in entries if entry.digest in theirs}


def _has_base(manifest: Manifest) -> bool:
    """Whether the base model can be run, with a head of its own if it needs one."""
    return manifest.mode != "folded" and manifest.base.own_head


def _weights(manifest: Manifest) -> str:
    """How the weights are quantised, in words; what they are computed in makes no difference."""
    entry = manifest.quantization
    if entry is None:
        return "unquantised"
    form = f"{entry.form}, block size {entry.block_size}, scales in {manifest.dtype}"
    return f"int{entry.bits} ({form})"
