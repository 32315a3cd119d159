"""Further parity cases of generative models.

| case | holds when |
|---|---|
| recomputing | the same tokens in one step, without a cache, are within the allowed error |
| right padding | rows padded at their end are within the allowed error too |
| padding inside | so are rows padded between prompt and continuation |
| greedy | greedy generation gives the oracle's tokens, from finite logits |

A graph that cannot read padding between tokens is not judged with any.

Where greedy tokens differ, the oracle's two best tokens must have been closer than two allowed
errors: a tie that rounding may decide either way.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.parity.comparison import hidden_positions
from propulsion_export.parity.evidence import Allowed, Evidence
from propulsion_export.parity.pooling import largest_error
from propulsion_export.parity.reports.report import Case, Check
from propulsion_export.parity.subject import Continuation, Subject
from propulsion_export.runners.decoding import (
    Generator,
    generate,
    greedy,
    recomputing,
    replaying,
)

_NO_GAPS = "; the graph reads no padding inside a row, so that is not judged"


def continue_greedily(generator: Generator, feeds: Tensors, steps: int) -> tuple[Array, Array]:
    """Greedy tokens after padded prompts and the margin of each choice, both [prompts, steps].

    The margin is the difference of the two best logits, float64: infinite where all other tokens
    are ruled out, NaN where a logit is NaN or the best is infinite.
    """
    margins: list[Array] = []

    def choose(logits: Array) -> Array:
        tokens, margin = greedy_choice(logits)
        margins.append(margin)
        return tokens

    going = generate(generator, feeds, choose)
    tokens = [next(going) for _ in range(steps)]
    return np.stack(tokens, axis=1), np.stack(margins, axis=1)


def greedy_choice(logits: Array) -> tuple[Array, Array]:
    """The likeliest tokens of logits [rows, vocabulary] and their margins, both [rows].

    See `continue_greedily`.
    """
    second, best = np.moveaxis(
        np.partition(logits.astype(np.float64), -2, axis=-1)[..., -2:], -1, 0
    )
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return greedy(logits), np.where(np.isfinite(best), best - second, np.nan)


def judge_generative(evidence: Evidence, allowed: Allowed) -> Iterator[Check]:
    """The cases of this module for every state, if the artifact generates."""
    if callable(evidence.candidate):
        return
    for subject in evidence.subjects:
        if subject.name in allowed:
            bound = allowed[subject.name][LOGITS]
            yield from judge_generation(subject, evidence.batches[0], evidence.candidate, bound)


def judge_generation(
    subject: Subject, batch: Tensors, candidate: Generator, allowed: float
) -> Iterator[Check]:
    """Check the further cases for one adapter.

    Args:
        subject: with the oracle's logits for `batch` as its first entry, and a continuation.
        batch: sequences padded on the left.
        candidate: the model under test.
        allowed: the allowed error of a logit, from the parity case.
    """
    once, stepwise = recomputing(candidate), replaying(candidate)
    note = "" if candidate.reads_gaps else _NO_GAPS
    oracle = subject.oracle[0][LOGITS]
    yield _case("recomputing", subject, once, batch, oracle, allowed)
    if "decoder_input_ids" not in batch:
        ended = padded_inside(batch, behind=0)
        expected = _moved(oracle, batch["attention_mask"], ended["attention_mask"])
        check = _case("right padding", subject, once, ended, expected, allowed)
        yield replace(check, detail=check.detail + note)
    if subject.inside is not None and candidate.reads_gaps:
        inside = padded_inside(batch)
        yield _case("padding inside", subject, stepwise, inside, subject.inside, allowed)
    yield _greedy(subject, candidate, allowed)


def padded_inside(batch: Tensors, *, behind: int = 5) -> Tensors:
    """The same rows with their padding moved from the left to before the last `behind` tokens.

    A batch of prompts padded on the right continues like this. Such padding counts towards the
    length of a sliding window, in transformers as in the graph, so that with a window the row alone
    gives other logits.
    """
    moved = {name: values.copy() for name, values in batch.items()}
    padding = (batch["attention_mask"] == 0).sum(1)
    for values in moved.values():
        front = values[:, : values.shape[1] - behind]
        for row, by in zip(front, padding, strict=True):
            row[:] = np.roll(row, -by)
    return moved


def _moved(values: Array, mask: Array, to: Array) -> Array:
    """Move values [rows, length, …] of real positions to the real positions of another mask."""
    moved = np.zeros_like(values)
    moved[to == 1] = values[mask == 1]
    return moved


def _case(
    case: Case, subject: Subject, run: Runner, batch: Tensors, expected: Array, allowed: float
) -> Check:
    found, oracle = run({**batch, **subject.feeds}), {LOGITS: expected}
    (hidden,) = hidden_positions(LOGITS, [batch], [oracle])
    error = largest_error(LOGITS, hidden, found, oracle)
    detail = f"{LOGITS}: error {error:.3g}, allowed {allowed:.3g}"
    return Check(case, subject.name, error <= allowed, detail)


def _greedy(subject: Subject, candidate: Generator, allowed: float) -> Check:
    torch = subject.continuation
    assert torch is not None
    prompts, steps = torch.tokens.shape
    tokens, margins = torch.candidate or continue_greedily(
        candidate, {**torch.prompt, **subject.feeds}, steps
    )
    # Logits that are not finite have a likeliest token too, and it may be the right one.
    lost = np.flatnonzero(np.isnan(margins).any(0))
    passed, findings = not len(lost), [f"logits are not finite at step {step}" for step in lost[:1]]
    for row in map(int, np.flatnonzero((tokens != torch.tokens).any(1))):
        step = int(np.argmax(tokens[row] != torch.tokens[row]))
        margin = float(torch.margins[row, step])
        passed &= margin <= 2 * allowed
        findings.append(f"prompt {row} parts {_parting(torch, row, step, margin, 2 * allowed)}")
    detail = "; ".join(findings) or f"all {steps} tokens behind {prompts} prompts are the oracle's"
    return Check("greedy", subject.name, passed, detail)


def _parting(torch: Continuation, row: int, step: int, margin: float, tie: float) -> str:
    assert torch.reference is not None
    behind = slice(0, step + 1)
    too = (torch.reference[row, behind] != torch.tokens[row, behind]).any()
    return (
        f"from the oracle at step {step}, where its two best logits are {margin:.3g} apart, "
        f"{'a tie' if margin <= tie else 'no tie'} (up to {tie:.3g}); PyTorch itself "
        f"{'does too' if too else 'does not'}"
    )
