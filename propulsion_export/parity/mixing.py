"""Parity of a bank in mixed batches, each row of which has its own adapter."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.artifacts.manifest import Manifest
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, LOGITS
from propulsion_export.errors import ToolError
from propulsion_export.parity.comparison import hidden_positions
from propulsion_export.parity.differences import differences
from propulsion_export.parity.evidence import Allowed, Evidence
from propulsion_export.parity.generation import continue_greedily
from propulsion_export.parity.probes import LARGE_BATCHES
from propulsion_export.parity.probing import allowed_on_probes
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Continuation, Subject
from propulsion_export.runners.decoding import Generator

_STEPS = 16  # tokens that mixed rows generate
# The largest bank that is made to try high ids, and the highest id that is tried.
_BANK_BYTES, _HIGHEST_ID = 2**28, 2**15 + 2**9
_MANY_ROWS = 34  # so that two rows are beyond 32, of which one has another adapter than the 32nd


def judge_mixed(evidence: Evidence, allowed: Allowed) -> Iterator[Check]:
    """Check that every row of a mixed batch is within the allowed error of its adapter's oracle.

    The detail also says whether each row is bit for bit as in a batch of its adapter alone; shapes
    are the same there, so that kernels have no reason to compute in another way. A generative model
    generates for mixed rows too. Only a bank has these cases.
    """
    if evidence.artifact.manifest.mode != "bank" or not allowed:
        return
    most = most_rows(evidence.artifact.manifest)
    yield mixed_rows(evidence.subjects, evidence.batches, evidence.runner, allowed, most=most)
    yield from _many_rows(evidence, allowed)
    if not callable(evidence.candidate):
        yield mixed_generation(evidence.subjects, evidence.candidate, allowed, most=most)


@dataclass(frozen=True)
class Arrangement:
    """Some rows of a batch, in any order and number, with an adapter each.

    Attributes:
        words: what is special about it.
        batch: the index of the batch.
        rows: the rows.
        states: the adapter, or the base model, of each row.
    """

    words: str
    batch: int
    rows: Sequence[int]
    states: Sequence[Subject]

    def run(self, inputs: Sequence[Tensors], candidate: Runner) -> Tensors:
        """The outputs of all rows."""
        chosen = {name: values[list(self.rows)] for name, values in inputs[self.batch].items()}
        return candidate({**chosen, **_feeds(self.states)})


@dataclass(frozen=True)
class _Shares:
    """The largest shares of the allowed error that the arrangements use, by their words."""

    found: dict[str, float] = field(default_factory=dict)

    def add(self, words: str, shares: Sequence[float]) -> None:
        """Keep the largest; NaN if there is one, which Python's own max() can lose."""
        self.found[words] = float(np.max([self.found.get(words, 0.0), *shares]))

    @property
    def worst(self) -> tuple[str, float]:
        place = int(np.argmax(list(self.found.values())))
        return list(self.found.items())[place]


def mixed_rows(
    subjects: Sequence[Subject],
    inputs: Sequence[Tensors],
    candidate: Runner,
    allowed: Allowed,
    *,
    most: int | None = None,
) -> Check:
    """The case `mixed` of states with one adapter id each among their feeds.

    Args:
        subjects: the states.
        inputs: the batches.
        candidate: the model under test.
        allowed: the allowed error of each output, by state.
        most: how many rows a batch may have; default: any number.
    """
    judged = [subject for subject in subjects if subject.name in allowed]
    shares, exact = _Shares(), True
    alone: dict[tuple[int, str], Tensors] = {}
    for one in arrangements(judged, inputs, most):
        found = one.run(inputs, candidate)
        errors = (
            (error, allowed[subject.name][name])
            for place, subject in enumerate(one.states)
            for name, error in _errors(subject, inputs, one, place, found)
        )
        shares.add(one.words, [_share(*each) for each in errors])
        if one.words == _IN_TURN:
            exact &= _is_as_alone(one, found, inputs, candidate, alone)
    words, worst = shares.worst
    return Check(
        "mixed",
        "all",
        worst <= 1,
        f"rows with an adapter each use up to {worst:.1%} of the allowed error; "
        f"{'bit for bit' if exact else 'not bit for bit'} as among rows of their adapter alone; "
        f"batches: {', '.join(shares.found)}; worst: {words}",
    )


def _many_rows(evidence: Evidence, allowed: Allowed) -> Iterator[Check]:
    """The case `mixed` of the large batches among the probes, and of ids that need many bits."""
    judged = [subject for subject in evidence.probed if subject.name in allowed]
    inputs = [probe.batch for probe in evidence.probes]
    large = [n for n, probe in enumerate(evidence.probes) if probe.purpose == LARGE_BATCHES]
    if not judged or not large:
        return
    bounds = {one.name: allowed_on_probes(evidence, one, allowed[one.name]) for one in judged}
    shares, highest = _Shares(), 0
    for number in large:
        count = len(inputs[number]["input_ids"])
        one = Arrangement(f"{count} rows", number, range(count), _drawn(judged, count, evidence))
        fed_as = {one.words: _feeds(one.states)}
        if BANK_INPUT in fed_as[one.words] and evidence.artifact.manifest.engine is None:
            fed_as["high ids"] = in_a_large_bank(fed_as[one.words])
        for words, fed in fed_as.items():
            highest = max(highest, int(fed[IDS_INPUT].max()))
            try:
                found = evidence.runner({**inputs[number], **fed})
            except ToolError as error:
                yield Check("mixed", "all, many rows", False, f"{words}: {error}")
                return
            shares.add(
                words,
                [
                    _share(error, bounds[subject.name][name])
                    for place, subject in enumerate(one.states)
                    for name, error in _errors(subject, inputs, one, place, found)
                ],
            )
    words, worst = shares.worst
    yield Check(
        "mixed",
        "all, many rows",
        worst <= 1,
        f"rows with an adapter each use up to {worst:.1%} of the allowed error; batches: "
        f"{', '.join(shares.found)} (up to {highest:,}); worst: {words}",
    )


def _drawn(judged: Sequence[Subject], count: int, evidence: Evidence) -> list[Subject]:
    """A state for each row, in no order that repeats; the last is another than the first."""
    places = np.random.default_rng(evidence.seed).integers(len(judged), size=count)
    if places[-1] == places[0]:
        places[-1] += 1
    return [judged[place % len(judged)] for place in places]


def in_a_large_bank(feeds: Tensors) -> Tensors:
    """The rows of a bank at the end of a large one, so that their ids need many bits.

    An id that is cast to a narrower type selects another row only where it is high. All rows before
    are zero, so that another row shows; pages of zeros take no memory until they are read. A bank
    that is as large itself stays as it is.
    """
    bank, ids = feeds[BANK_INPUT], feeds[IDS_INPUT]
    most = min(_HIGHEST_ID, _BANK_BYTES // max(1, bank[0].nbytes))
    before = (most - len(bank)) // 2**8 * 2**8 + 2**7 - len(bank)
    if before <= 0:
        return feeds
    large = np.zeros((before + len(bank), *bank.shape[1:]), bank.dtype)
    large[before:] = bank
    return {**feeds, BANK_INPUT: large, IDS_INPUT: (ids + before).astype(ids.dtype)}


_IN_TURN = "adapters in turn"


def arrangements(
    judged: Sequence[Subject], inputs: Sequence[Tensors], most: int | None = None
) -> Iterator[Arrangement]:
    """The mixed batches: as many in turn as give every adapter a row, then special ones.

    Args:
        judged: the states.
        inputs: the batches whose rows are taken.
        most: how many rows a batch may have.
    """
    rows = [len(next(iter(batch.values()))) for batch in inputs]
    chosen = cycle(judged)
    for index in islice(
        cycle(range(len(inputs))), max(len(inputs), math.ceil(len(judged) / rows[0]))
    ):
        yield Arrangement(_IN_TURN, index, range(rows[index]), list(islice(chosen, rows[index])))
    first = [judged[row % len(judged)] for row in range(rows[0])]
    yield Arrangement("in another order", 0, range(rows[0]), first[::-1])
    yield Arrangement("one in all rows", 0, range(rows[0]), first[:1] * rows[0])
    for place, subject in enumerate(judged):
        yield Arrangement("a single row", 0, [place % rows[0]], [subject])
    count = max(2 * max(len(judged), rows[0]) + 1, _MANY_ROWS)
    many = [place // 2 % rows[0] for place in range(count)][:most]
    # Behind every batch's worth of rows the order moves by one, so that it does not repeat.
    states = [judged[(place + place // rows[0]) % len(judged)] for place in range(len(many))]
    yield Arrangement("more rows than adapters, each twice", 0, many, states)


def _is_as_alone(
    one: Arrangement,
    found: Tensors,
    inputs: Sequence[Tensors],
    candidate: Runner,
    alone: dict[tuple[int, str], Tensors],
) -> bool:
    """Whether every row is bit for bit as among rows of its adapter; `alone` keeps what has run."""
    batch = inputs[one.batch]
    for subject in one.states:
        if (one.batch, subject.name) not in alone:
            alone[one.batch, subject.name] = candidate({**batch, **subject.feeds})
    expected = (alone[one.batch, subject.name] for subject in one.states)
    return all(
        np.array_equal(found[name][row], own[name][row])
        for row, own in enumerate(expected)
        for name in own
    )


def mixed_generation(
    subjects: Sequence[Subject],
    generator: Generator,
    allowed: Allowed,
    *,
    most: int | None = None,
) -> Check:
    """Check that rows with an adapter each generate the tokens that they generate alone.

    Where a token is another, the oracle's two best must have been closer than two allowed errors,
    as in the case `greedy`.

    Args:
        subjects: the states, with the continuations of the same prompts.
        generator: the model under test.
        allowed: the allowed error of the logits, by state.
        most: how many rows a batch may have.
    """
    going = [
        (subject, subject.continuation)
        for subject in subjects
        if subject.name in allowed and subject.continuation is not None
    ]
    prompt = going[0][1].prompt
    prompts = len(prompt["input_ids"])
    rows = [place % prompts for place in range(max(prompts, len(going)))][:most]
    pairs = list(islice(cycle(going), len(rows)))
    steps = min(_STEPS, *(told.tokens.shape[1] for _, told in pairs))
    taken = {name: values[rows] for name, values in prompt.items()}
    tokens, margins = continue_greedily(
        generator, {**taken, **_feeds([subject for subject, _ in pairs])}, steps
    )
    findings = [] if not np.isnan(margins).any() else ["logits are not finite"]
    for place, (subject, told) in enumerate(pairs):
        tie = 2 * allowed[subject.name][LOGITS]
        findings += _partings(subject.name, told, rows[place], tokens[place], tie)
    detail = "; ".join(findings) or f"{steps} tokens behind {len(rows)} mixed prompts are as alone"
    return Check("mixed", "all, generating", not findings, detail)


def most_rows(manifest: Manifest) -> int | None:
    """How many rows a batch of an engine may have; None without a limit."""
    if manifest.engine is None:
        return None
    shapes = [
        profile["input_ids"] for profile in manifest.engine.profiles if "input_ids" in profile
    ]
    return min((shape["max"][0] for shape in shapes), default=None)


def _partings(name: str, told: Continuation, row: int, tokens: Array, tie: float) -> Iterator[str]:
    """Where mixed tokens are others than alone, and rounding does not explain it."""
    expected = (told.tokens if told.candidate is None else told.candidate[0])[row, : len(tokens)]
    if (tokens == expected).all():
        return
    step = int(np.argmax(tokens != expected))
    margin = float(told.margins[row, step])
    if not margin <= tie:
        yield (
            f"prompt {row} with {name} parts at step {step} from what it generates alone, where "
            f"the oracle's two best logits are {margin:.3g} apart, no tie (up to {tie:.3g})"
        )


def _feeds(subjects: Sequence[Subject]) -> Tensors:
    ids: Array = np.concatenate([subject.feeds[IDS_INPUT] for subject in subjects])
    return {**subjects[0].feeds, IDS_INPUT: ids}


def _errors(
    subject: Subject, inputs: Sequence[Tensors], one: Arrangement, place: int, found: Tensors
) -> Iterator[tuple[str, float]]:
    """The largest error of each output in one row, without the positions that the mask hides."""
    batch, row = one.batch, one.rows[place]
    for name, expected in subject.oracle[batch].items():
        if name not in found or found[name].shape != (len(one.rows), *expected.shape[1:]):
            yield name, math.inf
            continue
        hidden = hidden_positions(name, inputs, subject.oracle)[batch][row]
        error = differences(found[name][place], expected[row])
        yield name, float(np.where(hidden, 0.0, error).max(initial=0))


def _share(error: float, bound: float) -> float:
    return error / bound if bound else (error and math.inf)
