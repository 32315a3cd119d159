"""What the unquantised model computes in PyTorch, to tell what quantisation costs."""

from collections.abc import Sequence

import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.parity.forwards import Compute, Work
from propulsion_export.parity.questions import own_outputs
from propulsion_export.parity.states import states_of
from propulsion_export.parity.subject import Subject


def compute_unquantised(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    compute: Compute,
) -> list[Subject]:
    """What `base` computes in float32 in every state, as oracle and as reference.

    Nothing is generated. float32 holds the weights of every checkpoint. The model may be left in
    it.
    """
    question = own_outputs(base, batches)
    states = states_of(artifact, base, adapters, ())
    works = [Work(state.attach, question.items) for state in states]
    answers = map(question.read, compute(base, works, torch.float32))
    return [
        Subject(state.name, outputs, outputs, None, {})
        for state, outputs in zip(states, answers, strict=True)
    ]
