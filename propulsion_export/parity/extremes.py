"""A probe of the rows whose outputs are the largest and the smallest among many short ones.

A mistake that shows only in large values, such as an output that is clipped, is seen by no row
whose outputs are all small.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.graph.sample_inputs import vocabulary_size
from propulsion_export.parity.forwards import Compute, Work
from propulsion_export.parity.probes import (
    ASK_THOROUGH,
    LEFT_OUT_BY_QUICK,
    Effort,
    Limits,
    Probe,
    random_rows,
)
from propulsion_export.parity.questions import own_outputs
from propulsion_export.parity.reports.report import Coverage
from propulsion_export.parity.states import State

_PURPOSE = "the largest and smallest outputs of many short rows"
_LENGTH = 12  # tokens of a row
_MOST_ROWS, _FEWEST_ROWS, _TAKEN = 384, 32, 12
# Parameters times tokens that drawing may cost, all states together, and tokens times outputs.
_MOST_WORK, _MOST_OUTPUTS = 2e10, 2**23


def extreme_probe(
    base: BaseModel,
    states: Sequence[State],
    compute: Compute,
    seed: int,
    effort: Effort,
    limits: Limits,
) -> tuple[list[Probe], list[Coverage]]:
    """The rows with the most extreme outputs of each state, out of as many as a budget allows.

    Args:
        base: the base model; it may be left in float32, in which all of its numbers are the same.
        states: the states to look at.
        compute: how PyTorch computes.
        seed: for the tokens.
        effort: `quick` draws none; `thorough` draws, whatever the time.
        limits: the most rows and tokens that the artifact takes.

    Returns:
        One probe or none, and what it covers or why it was left out.
    """
    if effort == "quick":
        return [], [Coverage(_PURPOSE, False, LEFT_OUT_BY_QUICK)]
    length = min(_LENGTH, limits.tokens or _LENGTH)
    count = _affordable(base, len(states), length)
    if count < _FEWEST_ROWS and effort != "thorough":
        return [], [Coverage(_PURPOSE, False, f"few rows are affordable: {ASK_THOROUGH}")]
    rows = random_rows(base, seed + 3, limits, max(count, _FEWEST_ROWS), length)
    taken = _extreme(base, states, compute, rows)[: min(_TAKEN, limits.rows or _TAKEN)]
    batch = {name: values[taken] for name, values in rows.items()}
    detail = f"{len(taken)} of {len(rows['input_ids'])} rows of {length} tokens"
    return [Probe(_PURPOSE, batch)], [Coverage(_PURPOSE, True, detail)]


def _affordable(base: BaseModel, states: int, length: int) -> int:
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    outputs = vocabulary_size(base.model.config) if TASKS[base.task].generates else 1
    most = min(_MOST_WORK / (max(1, parameters) * states), _MOST_OUTPUTS / outputs)
    return min(_MOST_ROWS, int(most / length))


def _extreme(
    base: BaseModel, states: Sequence[State], compute: Compute, rows: Tensors
) -> list[int]:
    """The numbers of the rows, those of each state's outputs in turn."""
    question = own_outputs(base, [rows], stepwise=False)
    works = [Work(state.attach, question.items) for state in states]
    dtype = base.model.dtype if base.model.dtype.itemsize >= 4 else torch.float32
    found = [question.read(each) for each in compute(base, works, dtype)]
    ends = [list(_ends(outputs)) for (outputs,) in found]
    return list(dict.fromkeys(row for each in zip(*ends, strict=True) for row in each))


def _ends(outputs: Tensors) -> Iterator[int]:
    """The row with the largest and that with the smallest value of each output."""
    for values in outputs.values():
        flat = np.nan_to_num(values.reshape(len(values), -1).astype(np.float64))
        yield int(flat.max(1).argmax())
        yield int(flat.min(1).argmin())
