"""What PyTorch computes to compare a quantised graph with, as it is shipped."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.parity.forwards import Compute, Work
from propulsion_export.parity.questions import own_outputs
from propulsion_export.parity.states import states_of
from propulsion_export.parity.subject import Subject
from propulsion_export.scaling.layer_rules import layer_kind

_LARGEST = 127  # of int8, symmetric


def compute_outputs(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    compute: Compute,
    dtype: str = "float32",
) -> list[Subject]:
    """What `base` computes in `dtype` in every state, as oracle and as reference.

    Nothing is generated, and all tokens are read in one step. float32 holds the weights of every
    checkpoint. The model may be left in `dtype`.
    """
    question = own_outputs(base, batches, in_one_step=range(len(batches)))
    states = states_of(artifact, base, adapters, ())
    works = [Work(state.attach, question.items) for state in states]
    answers = map(question.read, compute(base, works, getattr(torch, dtype)))
    return [
        Subject(state.name, outputs, outputs, None, {})
        for state, outputs in zip(states, answers, strict=True)
    ]


@contextmanager
def rounded_inputs(
    model: nn.Module, paths: Collection[str], entry: QuantizationEntry
) -> Iterator[None]:
    """Let linear layers read their inputs in 8 bits, as runtimes of quantised weights do.

    MatMulNBits at accuracy level 4 takes the largest input of a block for 127, a W8A8 graph one
    number for a whole tensor, for which the largest input of the tensor stands here.

    Args:
        model: a torch model.
        paths: of its quantised layers.
        entry: how their weights are quantised.
    """
    block = None if entry.activations else entry.block_size

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_in_8_bits(inputs[0], block), *inputs[1:])

    modules = [model.get_submodule(path) for path in paths]
    hooks = [
        module.register_forward_pre_hook(rounded)
        for module in modules
        if layer_kind(module) in ("linear", "conv1d")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_8_bits(values: torch.Tensor, block: int | None) -> torch.Tensor:
    """Values of [..., inputs] as multiples of a step for each block of inputs.

    Args:
        values: floating point.
        block: how many inputs have a step, 0: a row; None: one step for all.
    """
    if block is None:
        return _stepwise(values.reshape(1, -1)).reshape(values.shape)
    width = values.shape[-1]
    length = block or width
    padded = nn.functional.pad(values, (0, -width % length))
    rows = _stepwise(padded.reshape(-1, length)).reshape(padded.shape)
    return rows[..., :width]


def _stepwise(rows: torch.Tensor) -> torch.Tensor:
    step = rows.abs().amax(dim=1, keepdim=True) / _LARGEST
    return torch.where(step > 0, (rows / step).round() * step, rows)
