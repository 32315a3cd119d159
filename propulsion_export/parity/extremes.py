"""A probe of short rows whose outputs are as large and as small as a search finds them.

A mistake that shows only in large values, such as an output that is clipped, is seen by no row
whose outputs are all small.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.graph.sample_inputs import padding_token, vocabulary_size
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

_TYPES, _DECODER = "token_type_ids", "decoder_input_ids"
_PURPOSE = "the largest and smallest outputs of many short rows"
_LENGTH = 12  # tokens of a row
_MOST_ROWS, _FEWEST_ROWS, _TAKEN = 512, 32, 12
# After random rows, so many times as many rows are made of those that reach farthest, by changing
# a share of their tokens.
_ROUNDS, _CHANGED = 3, 0.3
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
    """The rows with the most extreme outputs of each state, among as many as a budget allows.

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
    part = max(count, _FEWEST_ROWS) // (1 + _ROUNDS)
    chooser = np.random.default_rng(seed + 3)
    rows = [
        _of_all_kinds(base, random_rows(base, seed + 4 + number, limits, part, length), chooser)
        for number in range(1 + _ROUNDS)
    ]
    found = _Extremes.of(base, states, compute, rows[0])
    for fresh in rows[1:]:
        found = found.better(_Extremes.of(base, states, compute, found.changed(fresh, chooser)))
    batch = found.rows(min(_TAKEN, limits.rows or _TAKEN))
    detail = f"{len(batch['input_ids'])} of {part * (1 + _ROUNDS)} rows of {length} tokens"
    return [Probe(_PURPOSE, batch)], [Coverage(_PURPOSE, True, detail)]


def _affordable(base: BaseModel, states: int, length: int) -> int:
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    outputs = vocabulary_size(base.model.config) if TASKS[base.task].generates else 1
    most = min(_MOST_WORK / (max(1, parameters) * states), _MOST_OUTPUTS / outputs)
    return min(_MOST_ROWS, int(most / length))


def _of_all_kinds(base: BaseModel, batch: Tensors, chooser: np.random.Generator) -> Tensors:
    """Rows with some of all tokens, special ones among them, and of all token types."""
    config, ids = base.model.config, batch["input_ids"]
    end = config.eos_token_id if pools_at_eos(config, base.task) else None
    tokens = np.setdiff1d(np.arange(vocabulary_size(config)), [padding_token(config), end or 0])
    kept = chooser.random(ids.shape) >= _CHANGED
    kept[:, -1] |= end is not None
    changed = {"input_ids": np.where(kept, ids, chooser.choice(tokens, ids.shape))}
    if _TYPES in batch:
        changed[_TYPES] = chooser.integers(0, config.type_vocab_size, ids.shape)
    return {**batch, **changed}


@dataclass(frozen=True)
class _Extremes:
    """For each end of each output of each state, the row that reaches farthest.

    Attributes:
        batch: a row for each.
        reached: how far each goes; float64 [rows].
    """

    batch: Tensors
    reached: Array

    @classmethod
    def of(
        cls, base: BaseModel, states: Sequence[State], compute: Compute, batch: Tensors
    ) -> "_Extremes":
        """The farthest of the rows of a batch."""
        question = own_outputs(base, [batch], in_one_step=[0])
        works = [Work(state.attach, question.items) for state in states]
        dtype = base.model.dtype if base.model.dtype.itemsize >= 4 else torch.float32
        results = [question.read(each)[0] for each in compute(base, works, dtype)]
        ends = np.array(
            [end for outputs in zip(*map(_ends, results), strict=True) for end in outputs]
        )
        best = ends.argmax(1)
        return cls({n: v[best] for n, v in batch.items()}, ends.max(1))

    def better(self, other: "_Extremes") -> "_Extremes":
        """Of each pair of rows the one that goes farther."""
        farther = other.reached > self.reached
        rows = np.where(farther, np.arange(len(farther)) + len(farther), np.arange(len(farther)))
        both = {n: np.concatenate([v, other.batch[n]])[rows] for n, v in self.batch.items()}
        return _Extremes(both, np.maximum(self.reached, other.reached))

    def changed(self, fresh: Tensors, chooser: np.random.Generator) -> Tensors:
        """Copies of the rows in turn with some of the tokens of fresh rows."""
        count = len(fresh["input_ids"])
        copies = {n: np.resize(v, (count, *v.shape[1:])) for n, v in self.batch.items()}
        for name in ("input_ids", _TYPES, _DECODER):
            if name in copies:
                kept = np.greater_equal(chooser.random(copies[name].shape), _CHANGED)
                kept[:, 0] |= name == _DECODER  # the token that it begins with
                copies[name] = np.where(kept, copies[name], fresh[name])
        return copies

    def rows(self, most: int) -> Tensors:
        """The rows without repetitions, the first of each state first."""
        _, first = np.unique(self.batch["input_ids"], axis=0, return_index=True)
        chosen = np.sort(first)[:most]
        return {name: values[chosen] for name, values in self.batch.items()}


def _ends(outputs: Tensors) -> Iterator[Array]:
    """How large, and how small, the values of each output get; float64 [rows] each."""
    for values in outputs.values():
        flat = values.reshape(len(values), -1).astype(np.float64)
        yield np.nan_to_num(flat).max(1)
        # Tokens that are ruled out, by minus infinity, are no small outputs.
        yield -np.nan_to_num(np.where(flat == -np.inf, np.inf, flat)).min(1)
