"""How far a mistake moves what a user sees, on a large sample of inputs that no verdict uses.

Parity's own inputs would not show what they do not reach; these are rows of the longest length, all
token types, all tokens, large batches, padding on both sides, and generation token by token.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mutation.toys import Toy
from propulsion_export import Session
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.tensor_names import IDS_INPUT, LOGITS
from propulsion_export.environment.progress import silent
from propulsion_export.graph.sample_inputs import input_names, padded_left
from propulsion_export.parity.comparison import compare, hidden_positions
from propulsion_export.parity.forwards import compute_whole
from propulsion_export.parity.inputs import load_recorded_base
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.parity.quantised.verdict import quantise_base_
from propulsion_export.parity.states import feeds_of
from propulsion_export.runners.decoding import Candidate, Generator, replaying
from propulsion_export.runners.opening import choose_runner, open_candidate

_SEED = 20_000  # far from the seeds that verdicts are given
_TOKENS = 100  # of the toys' vocabulary
_LONGEST = {"encoder": 38, "decoder": 150, "encoder-decoder": 150}
UNLOADABLE = "cannot be loaded"
_TEXTS = ("ba ce di", "DE fi gas ho", "ki la me ni pa re sis ta bol cor", "ci ba de")
_SMALLEST_SCORE = 0.01  # the change of a score that a user notices

# Outputs by state, batch and name.
Seen = Mapping[tuple[str, str, str], Array]


@dataclass(frozen=True)
class Moved:
    """The largest change of an output.

    Attributes:
        allowed: in times of what parity allows on the same sample; infinite where an output is
            lost, has another shape or is not finite, or a prediction for a text is another.
        scale: as a share of the output's largest value.
        where: which output it is.
    """

    allowed: float
    scale: float
    where: str


class Visible:
    """What a user sees of a clean artifact, to compare copies with."""

    def __init__(self, clean: Path, toy: Toy) -> None:
        self.toy = toy
        artifact = Artifact.read(clean)
        entries = artifact.list_adapters()
        adapters = [Adapter.read(entry.source, name) for name, entry in entries.items()]
        base = load_recorded_base(artifact, adapters, None)
        self.batches = tuple(_sample(toy, base.model))
        quantise_base_(artifact, base, adapters, self.batches, compute_whole("cpu"))
        subjects = compute_oracle(artifact, base, adapters, self.batches, silent, steps=1)
        self.hidden = {
            (subject.name, name): hidden_positions(name, self.batches, subject.oracle)
            for subject in subjects
            for name in subject.oracle[0]
        }
        self.states = tuple(subject.name for subject in subjects)
        self.outputs = dict(self._outputs(artifact))
        self.limits = {}
        for subject in subjects:
            found = [
                {name: self.outputs[subject.name, str(index), name] for name in subject.oracle[0]}
                for index in range(len(self.batches))
            ]
            for errors in compare(
                self.batches, subject.oracle, subject.reference, found, artifact.manifest.dtype
            ):
                self.limits[subject.name, errors.output] = errors.allowed, errors.scale
        self.predictions = _predictions(artifact.directory, self.states)

    def moved(self, directory: Path, *, texts: bool) -> Moved:
        """How far a copy is from the artifact.

        Where no output moves, and `texts` asks for it, another prediction for a text counts; greedy
        text is another after the smallest change.
        """
        try:
            found = dict(self._outputs(Artifact.read(directory)))
        except Exception as error:  # whatever a runtime raises: there is no output at all
            where = UNLOADABLE if "cannot load" in str(error) else "cannot be run"
            return Moved(math.inf, math.inf, f"{where}: {type(error).__name__}: {error}"[:300])
        worst = Moved(0.0, 0.0, "")
        for key, expected in self.outputs.items():
            moved = self._output_moved(key, expected, found.get(key))
            worst = max(worst, moved, key=lambda each: each.allowed)
        if texts and worst.allowed == 0 and self._text_moved(directory):
            return Moved(math.inf, worst.scale, "the prediction for a text")
        return worst

    def _output_moved(
        self, key: tuple[str, str, str], expected: Array, found: Array | None
    ) -> Moved:
        state, batch, name = key
        where = f"{name} of {state}, batch {batch}"
        if found is None or found.shape != expected.shape:
            return Moved(math.inf, math.inf, f"{where} is missing")
        with np.errstate(invalid="ignore"):
            change = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        if batch.isdigit() and (state, name) in self.hidden:
            change = np.where(self.hidden[state, name][int(batch)], 0, change)
        if not np.isfinite(change).all():
            return Moved(math.inf, math.inf, f"{where} is not finite")
        own = [limit for (_, output), limit in self.limits.items() if output == name]
        allowed, scale = self.limits.get((state, name)) or max(own)
        largest = float(change.max(initial=0))
        return Moved(largest / allowed, largest / scale, where)

    def _text_moved(self, directory: Path) -> bool:
        try:
            found = _predictions(directory, self.states)
        except Exception:  # a session that fails is seen
            return True
        return not _alike(found, self.predictions)

    def _outputs(self, artifact: Artifact) -> Iterator[tuple[tuple[str, str, str], Array]]:
        candidate = open_candidate(artifact, choose_runner(artifact, "auto"))
        run = candidate if callable(candidate) else replaying(candidate)
        for state in self.states:
            feeds = feeds_of(artifact, state, {})
            for index, batch in enumerate(self.batches):
                for name, values in run({**batch, **feeds}).items():
                    yield (state, str(index), name), values
            if not callable(candidate) and self.toy.dtype != "bfloat16":
                yield (state, "stepwise", LOGITS), _stepwise(candidate, self.batches[0], feeds)
        yield from self._mixed(artifact, candidate)

    def _mixed(
        self, artifact: Artifact, candidate: Candidate
    ) -> Iterator[tuple[tuple[str, str, str], Array]]:
        """Rows of every state in one batch of a bank."""
        if artifact.manifest.mode != "bank":
            return
        run = candidate if callable(candidate) else replaying(candidate)
        feeds = [feeds_of(artifact, state, {}) for state in self.states]
        batch = self.batches[-1]
        ids = np.resize(
            np.concatenate([each[IDS_INPUT] for each in feeds]), len(batch["input_ids"])
        )
        for name, values in run({**batch, **feeds[0], IDS_INPUT: ids}).items():
            yield ("mixed", "mixed", name), values


def _sample(toy: Toy, model: Any) -> Iterator[Tensors]:
    chooser = np.random.default_rng(_SEED)
    longest = _LONGEST[toy.architecture]
    slow = toy.dtype == "bfloat16"
    names = ("input_ids", "attention_mask")
    if toy.architecture == "encoder":
        names = input_names(type(model), model.config)
    shapes = [(4, min(longest, 48)), (9, 8)] if slow else [(12, longest), (40, 12), (33, 20)]
    for index, (rows, length) in enumerate(shapes):
        lengths = chooser.integers(max(12, length // 2) if index == 0 else 3, length + 1, rows)
        lengths[:1] = length
        yield _batch(toy, names, lengths, chooser, left=index == 1)


def _batch(
    toy: Toy, names: tuple[str, ...], lengths: Array, chooser: np.random.Generator, *, left: bool
) -> Tensors:
    """Rows of all tokens, special ones among them, and of both types; padded on one side."""
    shape = (len(lengths), int(lengths.max()))
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    ids = chooser.permuted(np.resize(np.arange(_TOKENS), shape).reshape(-1)).reshape(shape)
    batch = {"input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask}
    if "token_type_ids" in names:
        batch["token_type_ids"] = chooser.integers(0, 2, shape) * mask
    if toy.architecture == "decoder" or (toy.architecture == "encoder" and left):
        batch = dict(padded_left(batch))
    if toy.architecture == "encoder-decoder":
        length = 8 if toy.dtype == "bfloat16" else 60
        tokens = chooser.integers(0, _TOKENS, (len(lengths), length))
        tokens[:, 0] = 3 if toy.kind == "bart" else 0
        batch["decoder_input_ids"] = tokens
    return batch


def _stepwise(generator: Generator, batch: Tensors, feeds: Tensors) -> Array:
    """The logits of one row after four tokens, token by token, as in generation."""
    row = {name: values[:1] for name, values in batch.items()}
    opening = generator.open({**row, **feeds})
    tokens, mask = opening.tokens, opening.mask
    logits, state = opening.decoder.read(tokens[:, :4], mask[:, :4])
    parts = [logits]
    for place in range(4, min(tokens.shape[1], 120)):
        logits, state = opening.decoder.step(state, tokens[:, place : place + 1])
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def _predictions(directory: Path, states: tuple[str, ...]) -> dict[str, list[Any]]:
    """What a session predicts for texts in every state."""
    session = Session(directory)
    found = {}
    for state in states:
        replies = session(list(_TEXTS), adapter=state)
        found[state] = [reply.prediction for reply in replies]
    return found


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= _SMALLEST_SCORE * max(1.0, abs(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)
