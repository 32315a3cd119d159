"""Probes of rows that users feed, and that `probes` has not: other lengths, other padding.

| probe | what would slip through without it |
|---|---|
| a long row beside a short one | what is right only near a row's start |
| padding tokens that are read, and others that are hidden | a mask that is made of the tokens |
| a row of one token, and of two | a graph that was traced for more |
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
from propulsion_export.errors import ToolError
from propulsion_export.graph.sample_inputs import padding_token, vocabulary_size
from propulsion_export.parity.differences import differences
from propulsion_export.parity.forwards import Compute, Work
from propulsion_export.parity.inputs import FEWEST_DECODED
from propulsion_export.parity.probes import (
    LEFT_OUT_BY_QUICK,
    Effort,
    Limits,
    Probe,
    fitting_probes,
    random_rows,
)
from propulsion_export.parity.questions import own_outputs
from propulsion_export.parity.reports.report import Coverage
from propulsion_export.parity.states import State

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"
_FAR = "a long row beside a short one"
_PADDING = "padding tokens that are read, and others that are hidden"
_SHORTEST = "a row of one token, and of two"
# What the long row may cost a state: parameters times tokens, tokens times outputs, tokens.
_MOST_WORK, _MOST_OUTPUTS, _LONGEST = 1e10, 2**24, 512
_SHORT, _LENGTH = 5, 12
_READ = (1, 4)  # where padding tokens are read: before those that `replaying` reads with a cache
_ROUNDING = 1e-3  # the share of an output by which rounding in float32 may change it


def user_probes(
    base: BaseModel,
    states: Sequence[State],
    compute: Compute,
    seed: int,
    effort: Effort,
    limits: Limits,
) -> tuple[list[Probe], list[Coverage]]:
    """The probes of this module, and what they cover and leave out.

    Args:
        base: the base model; it may be left in float32, in which all of its numbers are the same.
        states: the states of the verdict, one of which is run to see what the model itself takes.
        compute: how PyTorch computes.
        seed: for the tokens.
        effort: `quick` has none.
        limits: the most rows and tokens that the artifact takes.
    """
    if effort == "quick":
        purposes = (_FAR, _PADDING, _SHORTEST)
        return [], [Coverage(purpose, False, LEFT_OUT_BY_QUICK) for purpose in purposes]
    maker = _Maker(base, states[0], compute, seed, limits)
    probes: list[Probe] = []
    coverage: list[Coverage] = []
    for purpose, batches in maker.batches():
        fitting, told = fitting_probes(purpose, batches, limits)
        probes += fitting
        coverage += told
    return probes, coverage


@dataclass(frozen=True)
class _Maker:
    base: BaseModel
    state: State
    compute: Compute
    seed: int
    limits: Limits

    @property
    def _on_left(self) -> bool:
        return TASKS[self.base.task].architecture == "decoder"

    def batches(self) -> Iterator[tuple[str, list[Tensors]]]:
        """The batches of each probe."""
        yield _FAR, list(self._far())
        if not pools_at_eos(self.base.model.config, self.base.task):
            yield _PADDING, list(self._padding())
            yield _SHORTEST, list(self._shortest())

    def _rows(self, count: int, length: int) -> Tensors:
        return random_rows(self.base, self.seed + 10, self.limits, count, length)

    def _far(self) -> Iterator[Tensors]:
        """The short row first, so that the long one is not the first of its batch."""
        batch = self._rows(2, self._affordable())
        length = batch[_IDS].shape[1]
        if _MASK not in batch or length <= FEWEST_DECODED:
            return
        hidden = self._hidden(batch, [length - FEWEST_DECODED, 0])
        if _TYPES in batch:
            count = self.base.model.config.type_vocab_size
            types = np.arange(length) * count // length
            hidden = {**hidden, _TYPES: np.where(hidden[_MASK] == 1, types, 0)}
        if pools_at_eos(self.base.model.config, self.base.task):
            hidden[_IDS][0, FEWEST_DECODED - 1] = self.base.model.config.eos_token_id
        yield hidden

    def _affordable(self) -> int:
        parameters = sum(parameter.numel() for parameter in self.base.model.parameters())
        most = min(_LONGEST, int(_MOST_WORK / max(1, parameters)))
        if TASKS[self.base.task].architecture != "encoder":
            most = min(most, _MOST_OUTPUTS // vocabulary_size(self.base.model.config))
        return max(most, 64)

    def _padding(self) -> Iterator[Tensors]:
        """Padding tokens to read, and tokens to hide unless the model itself looks at them."""
        batch = self._rows(3, _LENGTH)
        length = batch[_IDS].shape[1]
        if _MASK not in batch or length <= FEWEST_DECODED:
            return
        batch[_IDS][0, list(_READ)] = padding_token(self.base.model.config)
        counts = [0, length - FEWEST_DECODED, length - FEWEST_DECODED - 1]
        usual = self._hidden(batch, counts)
        other = {**usual, _IDS: np.where(usual[_MASK] == 1, usual[_IDS], batch[_IDS])}
        yield other if self._is_same(usual, other) else usual

    def _shortest(self) -> Iterator[Tensors]:
        """A decoder's prompt is one token; the tokens behind it are read with its cache."""
        behind = _SHORT if self._on_left else 0
        for length in (1,) if self._on_left else (1, 2):
            batch = self._rows(1, behind + length)
            if batch[_IDS].shape[1] == behind + length and self._runs(batch):
                yield batch

    def _hidden(self, batch: Tensors, counts: Sequence[int]) -> dict[str, Array]:
        """The batch with the first tokens of each row hidden, or the last."""
        mask = batch[_MASK].copy()
        for row, count in zip(mask, counts, strict=True):
            row[: count if self._on_left else 0] = 0
            row[len(row) if self._on_left else len(row) - count :] = 0
        padding = padding_token(self.base.model.config)
        return {**batch, _IDS: np.where(mask == 1, batch[_IDS], padding), _MASK: mask}

    def _outputs(self, batches: Sequence[Tensors]) -> tuple[Tensors, ...]:
        question = own_outputs(self.base, batches, in_one_step=range(len(batches)))
        dtype = self.base.model.dtype
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        (results,) = self.compute(self.base, [Work(self.state.attach, question.items)], wide)
        outputs: tuple[Tensors, ...] = question.read(results)
        return outputs

    def _runs(self, batch: Tensors) -> bool:
        """Whether the model takes a batch; a decoder takes rows of every length."""
        try:
            return self._on_left or bool(self._outputs([batch]))
        except ToolError:
            return False

    def _is_same(self, one: Tensors, other: Tensors) -> bool:
        """Whether the model gives the same for tokens that are not hidden."""
        first, second = self._outputs([one, other])
        seen = one[_MASK] == 1
        for name, values in first.items():
            positional = values.shape[:2] == seen.shape and "decoder_input_ids" not in one
            pair = [each[seen] if positional else each for each in (values, second[name])]
            limit = _ROUNDING * float(np.abs(pair[0][np.isfinite(pair[0])]).max(initial=0))
            if not float(differences(pair[1], pair[0]).max(initial=0)) <= limit:
                return False
        return True
