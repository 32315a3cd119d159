"""Inputs that show what random rows of everyday lengths do not: a table's end, a mask's other side.

Each probe is a batch with a purpose. `quick` has none, `standard` those that a budget of tokens
allows, `thorough` all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.manifest import Manifest
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.graph.sample_inputs import (
    input_names,
    padded_left,
    padding_token,
    random_batch,
    vocabulary_size,
    with_one_eos,
)
from propulsion_export.parity.inputs import FEWEST_DECODED, judged_length, shifted_right
from propulsion_export.parity.reports.report import Coverage

Effort = Literal["quick", "standard", "thorough"]
_MASK, _TYPES, _DECODER = "attention_mask", "token_type_ids", "decoder_input_ids"
# What the longest row of `standard` may cost a state: parameters times tokens (about a second
# in float64 on two cores), and tokens times outputs of each (256 MiB of float64).
_MOST_WORK, _MOST_OUTPUTS = 2e10, 2**25
_LONGEST = 2048  # tokens of a row of `standard`
_MOST_TOKENS = 2**15  # of a row of `thorough`
_BEHIND_CACHE = 4  # of the tokens that `replaying` reads behind the cache
_DECODED = 40  # tokens of a decoder behind an encoder: beyond the nearest relative positions
ASK_THOROUGH, LEFT_OUT_BY_QUICK = "ask with --thorough", "left out by --quick"


@dataclass(frozen=True)
class Probe:
    """One batch of inputs and what it is for.

    Attributes:
        purpose: what would slip through without it, in words.
        batch: the inputs.
    """

    purpose: str
    batch: Tensors

    @property
    def length(self) -> int:
        """How many tokens the longest row has; of an encoder-decoder, on either side."""
        tokens = (self.batch[name] for name in ("input_ids", _DECODER) if name in self.batch)
        return max(int(each.shape[1]) for each in tokens)


@dataclass(frozen=True)
class Limits:
    """What an artifact takes in its runner; None: any.

    Attributes:
        rows: the most rows of a batch.
        tokens: the most tokens of a row.
        single: the most tokens of a row that is alone in its batch; rows of a small batch may have
            as many together.
        empty: whether a row may have no tokens.
    """

    rows: int | None = None
    tokens: int | None = None
    single: int | None = None
    empty: bool = True

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        tokens: int | None = None,
        single: int | None = None,
        *,
        empty: bool = True,
    ) -> "Limits":
        """Those of an engine's profiles; the others are limits of the runner."""
        if manifest.engine is None:
            return cls(None, tokens, single or tokens, empty)
        most = [p["input_ids"]["max"] for p in manifest.engine.profiles if "input_ids" in p]
        lengths = [shape[1] for shape in most] + ([] if tokens is None else [tokens])
        longest = min(lengths, default=None)
        return cls(min((shape[0] for shape in most), default=None), longest, longest, empty)

    def takes(self, batch: Tensors) -> bool:
        """Whether a batch has no more rows and tokens, its rows without tokens left out."""
        rows, length = int((~hidden_rows(batch)).sum()), batch["input_ids"].shape[1]
        return rows <= (self.rows or rows) and length <= (self.tokens or length)

    def of_rows(self, count: int) -> "Limits":
        """Those of a batch of so many rows."""
        if self.tokens is None or self.single is None:
            return self
        return replace(self, tokens=max(self.tokens, self.single // count))


def make_probes(
    base: BaseModel, seed: int, effort: Effort, limits: Limits
) -> tuple[list[Probe], list[Coverage]]:
    """The probes for a model, and what they cover and leave out.

    Args:
        base: the base model.
        seed: for the tokens.
        effort: how much to look at.
        limits: batches that are larger are left out.
    """
    maker = _Maker.of(base, seed, effort, limits)
    probes: list[Probe] = []
    coverage: list[Coverage] = []
    for purpose, make, least in maker.kinds():
        if effort == "quick" or (least == "thorough" and effort != "thorough"):
            option = LEFT_OUT_BY_QUICK if effort == "quick" else ASK_THOROUGH
            coverage.append(Coverage(purpose, False, option))
            continue
        fitting, told = fitting_probes(purpose, make(), limits, maker.note(purpose))
        probes += fitting
        coverage += told
    return probes, coverage


def fitting_probes(
    purpose: str, batches: Iterable[Tensors], limits: Limits, note: str = ""
) -> tuple[list[Probe], list[Coverage]]:
    """The probes of those batches that the artifact takes, and what they cover and leave out.

    Args:
        purpose: of all of them.
        batches: what could be fed; none where the model itself takes none.
        limits: what the artifact takes.
        note: follows the shapes of the probes.
    """
    every = list(batches)
    misfits = [_misfit(batch, limits) for batch in every]
    fitting = [batch for batch, words in zip(every, misfits, strict=True) if words is None]
    shapes = ", ".join(" x ".join(map(str, batch["input_ids"].shape)) for batch in fitting)
    coverage = [Coverage(purpose, True, f"rows x tokens: {shapes}{note}")] if fitting else []
    coverage += [Coverage(purpose, False, words) for words in sorted({*filter(None, misfits)})]
    if not every:
        coverage.append(Coverage(purpose, False, "the model takes no such rows"))
    return [Probe(purpose, batch) for batch in fitting], coverage


def random_rows(base: BaseModel, seed: int, limits: Limits, count: int, length: int) -> Tensors:
    """Rows of random tokens as the architecture is fed, of at most `length` tokens each."""
    maker = _Maker.of(base, seed, "standard", limits.of_rows(count))
    return maker.rows([length] * count)


def coverage_of_batches(batches: Sequence[Tensors]) -> list[Coverage]:
    """What the inputs of the case `parity` cover."""
    lengths = [int(n) for batch in batches if _MASK in batch for n in batch[_MASK].sum(1)]
    if not lengths:
        return []
    detail = f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens"
    return [Coverage("rows of everyday lengths", True, detail)]


def read_in_one_step(batches: Sequence[Tensors], probes: Sequence[Probe]) -> set[int]:
    """Numbers of the everyday batches, and then of probes, that PyTorch reads without a cache.

    What a cache does to its error it shows on the first half of the batches, and on rows that are
    longer than any of them.
    """
    longest = max(Probe("", batch).length for batch in batches)
    short = (n for n, probe in enumerate(probes, len(batches)) if probe.length <= longest)
    return {*range(-(-len(batches) // 2), len(batches)), *short}


def _misfit(batch: Tensors, limits: Limits) -> str | None:
    """Why the artifact does not take a batch, in words; None if it does."""
    if limits.rows is not None and len(batch["input_ids"]) > limits.rows:
        return "more rows than the engine's profile takes"
    if not limits.empty and hidden_rows(batch).any():
        return "a graph of onnxruntime-genai's builder takes no row without tokens"
    return None


Kind = tuple[str, Callable[[], Iterable[Tensors]], Effort]


@dataclass(frozen=True)
class _Maker:
    """Make batches for a model.

    Attributes:
        base: the base model.
        names: the inputs of a batch.
        chooser: draws tokens.
        longest: the most tokens of a row that the model and the artifact take.
        possible: those of a row that is alone in its batch.
        affordable: the most tokens of the longest row.
    """

    base: BaseModel
    names: tuple[str, ...]
    chooser: np.random.Generator
    longest: int
    possible: int
    affordable: int

    @classmethod
    def of(cls, base: BaseModel, seed: int, effort: Effort, limits: Limits) -> "_Maker":
        config = base.model.config
        names: tuple[str, ...] = ("input_ids", _MASK)
        if TASKS[base.task].architecture != "decoder":
            names = input_names(type(base.model), config)
        longest = judged_length(config)
        possible = min(longest, limits.single or longest)
        longest = min(longest, limits.tokens or longest)
        affordable = _MOST_TOKENS if effort == "thorough" else _affordable(base)
        chooser = np.random.default_rng(seed + 2)
        return cls(base, names, chooser, longest, possible, min(possible, affordable))

    @property
    def architecture(self) -> str:
        return TASKS[self.base.task].architecture

    def note(self, purpose: str) -> str:
        """What a probe leaves out, if it does."""
        if purpose != _LONGEST_ROW or self.affordable == self.possible:
            return ""
        return f"; the model takes {self.possible}: {ASK_THOROUGH}"

    def kinds(self) -> Iterator[Kind]:
        """The purpose of each kind of probe, what makes it, and the least effort that has it."""
        yield _LONGEST_ROW, self._longest_row, "standard"
        yield "special tokens, and both ends of the vocabulary", self._vocabulary, "standard"
        yield LARGE_BATCHES, self._large_batches, "standard"
        if self.architecture == "encoder-decoder":
            yield "many tokens of the decoder", self._long_decoder, "standard"
        if self.architecture != "decoder" and not self._ends and _TYPES in self.names:
            yield "all token types", self._types, "standard"
        if _MASK in self.names:
            yield from self._masks()
        yield "rows around every length in the configuration", self._lengths, "thorough"

    def _masks(self) -> Iterator[Kind]:
        pools = TASKS[self.base.task].prediction == "embedding"  # nothing of a hidden row
        if not pools:
            yield "a row that the mask hides, beside others", self._masked, "standard"
        if self.architecture != "decoder" and not self._ends:
            yield "rows padded on the left", self._left, "standard"
            yield "rows padded inside", self._inside, "standard"

    @property
    def _ends(self) -> bool:
        return pools_at_eos(self.base.model.config, self.base.task)

    def _rows(self, lengths: Sequence[int]) -> Tensors:
        config = self.base.model.config
        most = self.possible if len(lengths) == 1 else self.longest
        lengths = tuple(min(length, most) for length in lengths)
        return random_batch(self.names, config, lengths, self.chooser)

    def rows(self, lengths: Sequence[int]) -> Tensors:
        """Rows of random tokens, as the architecture is fed."""
        return self._finished(self._rows(lengths))

    def _finished(self, batch: Tensors, decoded: int = 8) -> Tensors:
        """A batch as the architecture is fed."""
        config = self.base.model.config
        if self.architecture == "decoder":
            return padded_left(batch)
        if self.architecture == "encoder-decoder":
            drawn = (decoded,) * len(batch["input_ids"])
            tokens = random_batch(("input_ids",), config, drawn, self.chooser)["input_ids"]
            return {**batch, _DECODER: shifted_right(tokens, config)}
        return with_one_eos(batch, config) if self._ends else batch

    def _longest_row(self) -> Iterator[Tensors]:
        yield self._finished(self._rows([self.affordable]))

    def _long_decoder(self) -> Iterator[Tensors]:
        yield self._finished(self._rows([9, 5]), decoded=min(_DECODED, self.longest))
        yield self._finished(self._rows([9]), decoded=self.affordable)

    def _large_batches(self) -> Iterator[Tensors]:
        for rows in (9, 33):
            # No row is as long as its neighbour, so that each mask is another one.
            spread = max(2, min(5, self.longest - FEWEST_DECODED + 1))
            yield self.rows([FEWEST_DECODED + row % spread for row in range(rows)])

    def _vocabulary(self) -> Iterator[Tensors]:
        """Rows of special tokens, of the first and of the last; none of padding."""
        size, config = vocabulary_size(self.base.model.config), self.base.model.config
        padding = padding_token(config)
        ends = {config.eos_token_id} if self._ends and isinstance(config.eos_token_id, int) else ()
        allowed = np.array([t for t in range(size) if t != padding and t not in ends])
        first, last = allowed[: max(24, size // 20)], allowed[-12:]
        rows = [_special_tokens(config, set(allowed.tolist())), first[:12], last]
        rows += [self.chooser.choice(first, 12), self.chooser.choice(last, 12)]
        batch = self._rows([max(FEWEST_DECODED, len(row)) for row in rows])
        for row, tokens in zip(batch["input_ids"], rows, strict=True):
            row[: len(tokens)] = tokens[: len(row)]
        finished = self._finished(batch)
        if _DECODER not in finished:
            yield finished
            return
        yield {**finished, _DECODER: shifted_right(batch["input_ids"], config)}
        yield self._read_with_cache(np.unique(np.concatenate(rows)))

    def _read_with_cache(self, tokens: Array) -> Tensors:
        """A batch whose decoder reads all of the tokens last, behind its cache."""
        groups = np.resize(tokens, (-(-len(tokens) // _BEHIND_CACHE), _BEHIND_CACHE))
        batch = dict(self.rows([FEWEST_DECODED] * len(groups)))
        batch[_DECODER][:, -_BEHIND_CACHE:] = groups
        return batch

    def _types(self) -> Iterator[Tensors]:
        batch = self._rows([12, 9, 5])
        count = self.base.model.config.type_vocab_size
        types = np.sort(self.chooser.integers(0, count, batch[_TYPES].shape), axis=1)
        types[:, -1] = count - 1
        types[:, 0] = 0
        yield self._finished({**batch, _TYPES: np.where(batch.get(_MASK, 1) == 1, types, 0)})

    def _left(self) -> Iterator[Tensors]:
        yield self._finished(padded_left(self._rows([12, 9, 5])))

    def _inside(self) -> Iterator[Tensors]:
        batch = self._rows([12, 11, 10])
        mask = batch[_MASK].copy()
        mask[1:, 3:5] = 0
        tokens = np.where(mask == 1, batch["input_ids"], padding_token(self.base.model.config))
        yield self._finished({**batch, "input_ids": tokens, _MASK: mask})

    def _masked(self) -> Iterator[Tensors]:
        batch = self._rows([12, 12, 7])
        mask = batch[_MASK].copy()
        mask[1] = 0
        yield self._finished({**batch, _MASK: mask})

    def _lengths(self) -> Iterator[Tensors]:
        for number in _numbers_in(self.base.model.config, self.affordable):
            lengths = [length for length in (number - 1, number, number + 1) if length > 2]
            yield self._finished(self._rows(lengths))


_LONGEST_ROW = "a row of the longest length"
LARGE_BATCHES = "batches of 9 and of 33 rows"


def hidden_rows(batch: Tensors) -> Array:
    """Bool [rows]: the rows of which the mask hides every token; nothing is expected of them."""
    if _MASK not in batch:
        return np.zeros(len(batch["input_ids"]), bool)
    hidden: Array = (batch[_MASK] == 0).all(1)
    return hidden


def _affordable(base: BaseModel) -> int:
    config = base.model.config
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    most = min(_LONGEST, int(_MOST_WORK / max(1, parameters)))
    if TASKS[base.task].architecture != "encoder":
        most = min(most, _MOST_OUTPUTS // vocabulary_size(config))
    return max(most, 64)


def _special_tokens(config: Any, allowed: set[int]) -> Array:
    """The tokens that a configuration names; int64 [count]."""
    named = [value for name, value in config.to_dict().items() if name.endswith("_token_id")]
    flat = [t for value in named for t in (value if isinstance(value, list) else [value])]
    found = sorted({t for t in flat if isinstance(t, int)} & allowed)
    return np.array(found or sorted(allowed)[:1], np.int64)


def _numbers_in(config: Any, most: int) -> list[int]:
    """Lengths at which a model may change what it does: numbers in its settings, powers of two."""
    found = {2**exponent for exponent in range(3, 16)}
    for name, value in _settings(config.to_dict()):
        if any(word in name for word in ("window", "position", "distance", "bucket", "length")):
            found.add(value)
    return sorted(number for number in found if 4 <= number < most)


def _settings(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def seen_rows(batch: Tensors, outputs: Tensors) -> Tensors:
    """The outputs of the rows of which the mask hides not every token."""
    seen = ~hidden_rows(batch)
    if seen.all():
        return outputs
    return {n: v[seen] if len(v) == len(seen) else v for n, v in outputs.items()}


def without_hidden_rows(probe: Probe) -> Probe:
    """The probe with those rows only."""
    return replace(probe, batch=seen_rows(probe.batch, probe.batch))
