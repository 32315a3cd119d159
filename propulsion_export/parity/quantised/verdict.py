"""What parity says of a quantised artifact beside its cases: weights, rounding and price."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import UsageError
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.quantisation.node_weights import NodeWeight, node_weights
from propulsion_export.parity.comparison import mismatch
from propulsion_export.parity.forwards import Compute
from propulsion_export.parity.price import (
    Meaning,
    is_judgeable,
    price_checks,
    price_of,
    with_perplexity,
)
from propulsion_export.parity.quantised.base_weights import (
    check_weights,
    every_linear_layer,
    match,
    use_quantised_weights_,
)
from propulsion_export.parity.quantised.outputs import compute_outputs, rounded_inputs
from propulsion_export.parity.quantised.shipped import OutputsByName, judge_shipped
from propulsion_export.parity.reports.report import Check, NotRun, ParityReport, Price
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import Candidate, replaying
from propulsion_export.runners.opening import open_candidate, opens_in_float


def check_price_option(artifact: Artifact, max_kl: float | None) -> None:
    """Refuse `--max-kl` where no divergence can be measured.

    Raises:
        UsageError: the artifact is not quantised, or returns vectors.
    """
    if max_kl is None:
        return
    if artifact.manifest.quantization is None:
        raise UsageError(
            f"--max-kl: {artifact.shown} has no quantised weights, expected an export with "
            "--quantize",
            remedy="Leave it out.",
        )
    if not is_judgeable(artifact.manifest.task):
        raise UsageError(
            f"--max-kl: {artifact.shown} returns embeddings, expected a task with a "
            "distribution over tokens or classes",
            remedy="Leave it out; the report has their cosine distance.",
        )


@dataclass(frozen=True)
class QuantisedParity:
    """What is known of a quantised artifact before it is run.

    Attributes:
        artifact: what is judged.
        batches: the inputs.
        unquantised: what the unquantised model computes; see `compute_outputs`.
        weights: the check of the weights, or why there is none.
        paths: of the quantised layers.
        rounded: what PyTorch computes with rounded activations; see `with_rounded_activations`.
    """

    artifact: Artifact
    batches: Sequence[Tensors]
    unquantised: Sequence[Subject]
    weights: Check | NotRun
    paths: Sequence[str]
    rounded: Sequence[Subject] = ()

    def with_rounded_activations(
        self, base: BaseModel, adapters: Sequence[Adapter], compute: Compute
    ) -> Self:
        """Compute what quantised layers make of inputs in 8 bits; leaves the artifact's dtype."""
        manifest = self.artifact.manifest
        assert manifest.quantization is not None
        with rounded_inputs(base.model, self.paths, manifest.quantization):
            found = compute_outputs(
                self.artifact, base, adapters, self.batches, compute, manifest.dtype
            )
        return replace(self, rounded=found)

    def extend(
        self,
        report: ParityReport,
        subjects: Sequence[Subject],
        shipped: Candidate,
        *,
        texts: bool,
    ) -> ParityReport:
        """The report of the cases with the weights, the graph as shipped, and the price.

        Args:
            report: with the checks of the graph in floating point, where there is one.
            subjects: what PyTorch computes with the dequantised weights.
            shipped: the graph as shipped.
            texts: whether the batches are given texts, whose perplexity says something.
        """
        run = shipped if callable(shipped) else replaying(shipped)
        found = outputs_of(subjects, self.batches, run)
        rounded = {one.name: one.oracle for one in self.rounded}
        dtype, exact = self.artifact.manifest.dtype, _errors(report.checks)
        verdict = judge_shipped(subjects, self.batches, found, rounded, dtype, exact)
        weights = [self.weights] if isinstance(self.weights, Check) else []
        not_run = [self.weights] if isinstance(self.weights, NotRun) else []
        return replace(
            report,
            checks=(*weights, *report.checks, *verdict.checks),
            not_run=(*not_run, *report.not_run, *verdict.not_run),
            rounding=verdict.rounding,
            price=tuple(self._price(found, texts)),
        )

    def _price(self, found: OutputsByName, texts: bool) -> Iterator[Price]:
        """The price of every output that the artifact has in the form that it should have."""
        for plain in self.unquantised:
            outputs, meaning = found[plain.name], Meaning.of(self.artifact, plain.name)
            if any(map(mismatch, plain.oracle, outputs)):
                continue
            for price in price_of(plain.name, meaning, self.batches, plain.oracle, outputs):
                if texts and TASKS[meaning.task].architecture == "decoder":
                    yield with_perplexity(price, self.batches, plain.oracle, outputs)
                else:
                    yield price


def quantise_base_(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    compute: Compute,
) -> QuantisedParity | None:
    """Give `base` the dequantised weights of an artifact; None if it is not quantised.

    Raises:
        ArtifactError: the artifact's quantised weights cannot be read.
    """
    entry, dtype = artifact.manifest.quantization, artifact.manifest.dtype
    if entry is None:
        return None
    nodes = _nodes(artifact)
    plain = compute_outputs(artifact, base, adapters, batches, compute)
    if nodes is None:
        kept = {name for adapter in adapters for name in adapter.modules}
        weights = every_linear_layer(base, entry, kept, dtype)
        use_quantised_weights_(base, weights)
        reason = "the weights of an engine cannot be read; its outputs are compared all the same"
        not_run = NotRun("weights", reason)
        return QuantisedParity(artifact, batches, plain, not_run, [one.path for one in weights])
    folded = adapters[0] if adapters and artifact.manifest.mode == "folded" else None
    found = match(base, nodes, dtype, folded)
    use_quantised_weights_(base, found.weights)
    paths = [one.path for one in found.weights]
    return QuantisedParity(artifact, batches, plain, check_weights(found, folded), paths)


def exact_candidate(
    artifact: Artifact, runner: str, shipped: Candidate, *, trust_remote_code: bool = False
) -> Candidate | None:
    """The artifact with quantised layers that compute in floating point.

    The artifact itself if it is exact as it is, None if its runtime can only round activations.
    """
    entry = artifact.manifest.quantization
    if entry is None:
        return shipped
    if opens_in_float(runner):
        return open_candidate(artifact, runner, trust_remote_code=trust_remote_code, in_float=True)
    return shipped if entry.activations is None else None


def judge_price(report: ParityReport, max_kl: float | None) -> ParityReport:
    """The report with a check of every divergence, where `max_kl` asks for it.

    Outputs that are numbers and no distribution are *not run*.
    """
    if max_kl is None:
        return report
    checks = tuple(price_checks(report.price, max_kl))
    numbers = (
        NotRun(f"price of {one.adapter}", f"{one.output} has numbers, and no distribution")
        for one in report.price
        if one.kl is None
    )
    return replace(report, checks=(*report.checks, *checks), not_run=(*report.not_run, *numbers))


def _nodes(artifact: Artifact) -> list[NodeWeight] | None:
    """The quantised weights of all graphs; None for an engine, whose weights cannot be read."""
    if artifact.manifest.kind != "onnx":
        return None
    names = list(artifact.manifest.graphs) or [GRAPH_FILE]
    return [node for name in names for node in node_weights(read_graph(artifact.directory, name))]


def outputs_of(
    subjects: Sequence[Subject], inputs: Sequence[Tensors], run: Runner
) -> OutputsByName:
    """What a runner returns in every state, batch by batch."""
    return {
        subject.name: [run({**batch, **subject.feeds}) for batch in inputs] for subject in subjects
    }


def _errors(exact: Sequence[Check]) -> Mapping[tuple[str, str], float]:
    """The errors of the graph in floating point, by adapter and output."""
    return {
        (check.adapter, errors.output): errors.rms
        for check in exact
        if check.case == "parity"
        for errors in check.outputs
    }
