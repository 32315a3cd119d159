"""What is asked of PyTorch for the oracle, by architecture, and how to read the answers.

| architecture | in float64 | at the artifact's precision |
|---|---|---|
| encoder | rows alone, see `encoder_rows` | the batches |
| decoder | rows alone, see `alone` | the batches, stepwise with a cache |
| encoder-decoder | rows alone | the batches, stepwise with a cache |
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.base_model.eos_pooling import check_eos, pools_at_eos
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.parity.alone import grouped, in_batches, rows_of, run_alone, ungrouped
from propulsion_export.parity.continuing import Drafted
from propulsion_export.parity.encoder_rows import grouped_rows
from propulsion_export.parity.forwards import Forwards, Item, decoder_pass
from propulsion_export.parity.generation import padded_inside
from propulsion_export.runners.decoding import alone, recomputing, replaying


@dataclass(frozen=True, eq=False)
class Question:
    """Items to compute, and how to read the value wanted from their outputs."""

    items: Sequence[Item]
    read: Callable[[Sequence[Tensors]], Any]


def outputs_in_float64(base: BaseModel, batches: Sequence[Tensors], *, together: bool) -> Question:
    """The outputs of every batch, of each row alone; rows run together only if asked to.

    An encoder's rows run in their padded batches if they are not to run together: it is asked for
    where such a model has no rows alone.

    Raises:
        PaddingChangesRowsError: raised on reading, if rows that ran together changed each other.
    """
    if _architecture(base) == "decoder":
        rows = _rows_alone(rows_of(batches), together=together)
        return Question(rows.items, lambda found: tuple(in_batches(rows.read(found), batches)))
    if _architecture(base) == "encoder-decoder":
        return Question([_alone(batch) for batch in batches], tuple)
    if together and all("attention_mask" in batch for batch in batches):
        return _encoder_rows_alone(base, batches)
    return _of_encoder(base, batches)


def own_outputs(
    base: BaseModel, batches: Sequence[Tensors], *, in_one_step: Container[int] = ()
) -> Question:
    """The outputs of every batch as PyTorch computes them in practice.

    A generative model reads most of the tokens, then others behind its cache; all of them at once
    in the batches whose numbers are in `in_one_step`.
    """
    if _architecture(base) == "encoder":
        return _of_encoder(base, batches)
    stepwise = [number not in in_one_step for number in range(len(batches))]
    pairs = zip(batches, stepwise, strict=True)
    if _architecture(base) == "decoder":
        passes = (
            decoder_pass(batch["input_ids"], batch["attention_mask"], stepwise=each)
            for batch, each in pairs
        )
        return Question(list(passes), tuple)
    return Question([_stepwise(b) if each else _in_one_step(b) for b, each in pairs], tuple)


def own_procedures(base: BaseModel, batch: Tensors) -> dict[str, Question]:
    """What `own_outputs` does with a batch beyond a row alone, step by step; named by a phrase.

    Each gives the outputs of the one batch.
    """
    padded, cached = "in a padded batch", "with a cache, step by step"
    if _architecture(base) == "decoder":
        tokens = (batch["input_ids"], batch["attention_mask"])
        return {
            padded: Question([decoder_pass(*tokens)], tuple),
            cached: Question([decoder_pass(*tokens, stepwise=True)], tuple),
        }
    if _architecture(base) == "encoder-decoder":
        return {
            padded: Question([_in_one_step(batch)], tuple),
            cached: Question([_stepwise(batch)], tuple),
        }
    return {padded: _of_encoder(base, [batch])}


def row_alone(base: BaseModel, batch: Tensors, row: int) -> Item:
    """One row of a batch without its padding, in one pass."""
    single = alone(batch, row)
    if _architecture(base) == "decoder":
        return decoder_pass(single["input_ids"], single["attention_mask"])
    if _architecture(base) == "encoder-decoder":
        return _in_one_step(single)
    return Forwards((single,))


def logits_padded_inside(batch: Tensors) -> Question:
    """The logits of a decoder for a batch padded inside; None if they choose no token somewhere."""
    padded = padded_inside(batch)
    mask = padded["attention_mask"]

    def finite(found: Sequence[Tensors]) -> Array | None:
        logits: Array = found[0][LOGITS]
        return logits if np.isfinite(logits[mask == 1].max(-1)).all() else None

    return Question([decoder_pass(padded["input_ids"], mask)], finite)


def continuation(base: BaseModel, draft: Drafted, *, together: bool) -> Question:
    """The oracle's `Continuation` behind every prompt alone.

    Raises:
        PaddingChangesRowsError: as by `outputs_in_float64`.
    """
    if _architecture(base) == "decoder":
        rows = _rows_alone(draft.whole, together=together)
        return Question(rows.items, lambda found: draft.continuation(rows.read(found)))
    return Question([_alone(draft.begun)], lambda found: draft.continuation(found[0][LOGITS]))


def own_choices(base: BaseModel, draft: Drafted) -> Question:
    """The tokens, int64 [prompts, steps], that PyTorch itself chooses behind padded prompts."""
    item: Item
    if _architecture(base) == "decoder":
        item = decoder_pass(draft.padded["input_ids"], draft.padded["attention_mask"])
    else:
        item = _in_one_step(draft.begun)
    return Question([item], lambda found: draft.chosen(found[0][LOGITS]))


def _architecture(base: BaseModel) -> str:
    return TASKS[base.task].architecture


def _rows_alone(rows: Sequence[Array], *, together: bool) -> Question:
    """The logits of every row, [length, vocabulary]."""
    arranged = grouped(rows) if together else ungrouped(rows)
    probe = arranged.probe
    if probe is None:
        return Question(arranged.forwards, arranged.logits)
    return Question([*arranged.forwards, probe], arranged.checked_logits)


def _encoder_rows_alone(base: BaseModel, batches: Sequence[Tensors]) -> Question:
    """The outputs of every row alone, at their places in the batches."""
    rows = grouped_rows(batches, together=not pools_at_eos(base.model.config, base.task))
    if rows.most_padded is None:
        return _of_encoder(base, batches)
    single, padded = rows.forwards, _passes(base, batches[rows.most_padded])

    def read(found: Sequence[Tensors]) -> tuple[Tensors, ...]:
        return rows.outputs(found[: len(single)], _joined(found[len(single) :]))

    return Question([*single, *padded], read)


def _of_encoder(base: BaseModel, batches: Sequence[Tensors]) -> Question:
    """A classifier that reads end-of-sequence tokens takes one row at a time."""
    split = [_passes(base, batch) for batch in batches]

    def read(found: Sequence[Tensors]) -> tuple[Tensors, ...]:
        remaining = iter(found)
        return tuple(_joined([next(remaining) for _ in each]) for each in split)

    return Question([item for each in split for item in each], read)


def _passes(base: BaseModel, batch: Tensors) -> list[Forwards]:
    if not pools_at_eos(base.model.config, base.task):
        return [Forwards((batch,))]
    check_eos(batch["input_ids"], base.model.config)
    rows = range(len(batch["input_ids"]))
    return [Forwards(({n: v[row : row + 1] for n, v in batch.items()},)) for row in rows]


def _joined(parts: Sequence[Tensors]) -> Tensors:
    """Outputs of single rows as outputs of the batch; those without rows are left out."""
    if len(parts) == 1:
        return parts[0]
    return {
        name: np.concatenate([part[name] for part in parts])
        for name, values in parts[0].items()
        if len(values) == 1
    }


def _alone(batch: Tensors) -> Item:
    return lambda generator: run_alone(recomputing(generator), batch)


def _stepwise(batch: Tensors) -> Item:
    return lambda generator: replaying(generator)(batch)


def _in_one_step(batch: Tensors) -> Item:
    return lambda generator: recomputing(generator)(batch)
