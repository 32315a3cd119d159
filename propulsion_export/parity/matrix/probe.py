"""Run an artifact on one small batch, whose outputs are compared bit for bit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.parity.evidence import Evidence
from propulsion_export.runners.decoding import Candidate, Generator, generate, greedy

_STEPS = 5  # tokens that are generated: the first from the prompt, the others from a cache


@dataclass(frozen=True)
class Probe:
    """A candidate with a batch to run it on.

    Attributes:
        batch: the inputs without an adapter's; prompts of a generative model.
        candidate: runs it.
        steps: how many tokens a generative model generates.
    """

    batch: Tensors
    candidate: Candidate
    steps: int = _STEPS

    @classmethod
    def of(cls, evidence: Evidence) -> "Probe":
        """The candidate on its first batch, or on the prompts that the oracle continues."""
        candidate = evidence.candidate
        if callable(candidate):
            return cls(evidence.batches[0], candidate)
        going = evidence.subjects[0].continuation
        assert going is not None  # the oracle continues prompts for every generative model
        return cls(going.prompt, candidate, min(_STEPS, going.tokens.shape[1]))

    def run(self, feeds: Tensors) -> Tensors:
        """The outputs for the batch with the inputs of an adapter.

        Those of a generative model are the logits of the tokens that it generates from an empty
        cache, [prompts, steps, vocabulary].
        """
        if callable(self.candidate):
            return self.candidate({**self.batch, **feeds})
        return self.take_turns(self.candidate, [feeds])[0]

    def take_turns(self, generator: Generator, feeds: Sequence[Tensors]) -> list[Tensors]:
        """What `run` returns for each adapter, generated in turns of one token."""
        going = [_logits_of(generator, {**self.batch, **each}) for each in feeds]
        turns = [[next(each) for each in going] for _ in range(self.steps)]
        return [{LOGITS: np.stack(logits, axis=1)} for logits in zip(*turns, strict=True)]


def changed(before: Tensors, after: Tensors) -> list[str]:
    """The names of outputs that are not bit for bit the same."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not same_bits(before[name], after[name])
    )


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays have the same shape, dtype and bytes."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def _logits_of(generator: Generator, feeds: Tensors) -> Iterator[Array]:
    """The logits [prompts, vocabulary] of each step of greedy generation, without end."""
    seen: list[Array] = []

    def choose(logits: Array) -> Array:
        seen.append(np.array(logits))
        return greedy(logits)

    for _ in generate(generator, feeds, choose):
        yield seen.pop()
