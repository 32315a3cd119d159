"""What a verdict is based on: what PyTorch computes, and what runs the artifact."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.parity.forwards import Compute
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import Candidate, replaying

# The error that the case `parity` allows, by subject and output.
Allowed = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Evidence:
    """Everything that the cases of a verdict compare.

    Attributes:
        artifact: what is judged.
        base: its base model in PyTorch.
        adapters: its adapters, or those drawn for it.
        batches: the inputs.
        subjects: every state of the model, as PyTorch computes it on the inputs.
        candidate: runs the artifact.
        compute: how PyTorch computes.
        seed: for what a case chooses at random.
    """

    artifact: Artifact
    base: BaseModel
    adapters: Sequence[Adapter]
    batches: Sequence[Tensors]
    subjects: Sequence[Subject]
    candidate: Candidate
    compute: Compute
    seed: int

    @property
    def runner(self) -> Runner:
        """The candidate as a runner of whole sequences, also where it generates."""
        return self.candidate if callable(self.candidate) else replaying(self.candidate)


# A family of cases that needs to know what the case `parity` allows.
FurtherCases = Callable[[Evidence, Allowed], Iterable[Check]]


def allowed_errors(checks: Iterable[Check]) -> dict[str, dict[str, float]]:
    """What the case `parity` allows; without subjects whose outputs could not be compared."""
    return {
        check.adapter: {errors.output: errors.allowed for errors in check.outputs}
        for check in checks
        if check.case == "parity" and check.outputs
    }
