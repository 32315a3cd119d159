"""Sample the next token from a model's logits: temperature, top-k and top-p."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to sample; names and order are those of transformers' generate().

    Attributes:
        temperature: logits are divided by it: below 1 the likely tokens become likelier.
        top_k: sample from this many of the likeliest tokens, and those as likely as the last.
        top_p: sample from the likeliest tokens that together have at least this probability.

    Raises:
        UsageError: one of them is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(
                f"--temperature: {self.temperature:g}, expected a number above 0",
                remedy="Without it every token is the likeliest one.",
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k: {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p: {self.top_p:g}, expected a number above 0, at most 1")


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The probability of each token, float64 [batch, vocabulary], from logits of that shape."""
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a low temperature leaves the likeliest tokens alone
        scaled = (wide - wide.max(-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = np.partition(scaled, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scaled = np.where(scaled < least, -np.inf, scaled)
    shares = _softmax(scaled)
    if sampling.top_p is not None and sampling.top_p < 1:
        shares = np.where(_nucleus(shares, sampling.top_p), shares, 0)
    return _whole(shares)


def sampler(
    sampling: Sampling, choosers: Sequence[np.random.Generator]
) -> Callable[[Array], Array]:
    """A function that samples tokens, int64 [batch], from logits; each row has its chooser."""

    def choose(logits: Array) -> Array:
        ends = probabilities(logits, sampling).cumsum(-1)
        drawn = [
            np.searchsorted(row, chooser.random() * row[-1], side="right")
            for row, chooser in zip(ends, choosers, strict=True)
        ]
        return np.array(drawn, np.int64)

    return choose


def _softmax(logits: Array) -> Array:
    return _whole(np.exp(logits - logits.max(-1, keepdims=True)))


def _whole(shares: Array) -> Array:
    divided: Array = shares / shares.sum(-1, keepdims=True)
    return divided


def _nucleus(shares: Array, least: float) -> Array:
    """Whether a token is among the fewest that together have the probability `least`; bool."""
    order = np.argsort(shares, axis=-1, kind="stable")
    before = np.take_along_axis(shares, order, -1).cumsum(-1)
    kept = before > 1 - least
    kept[:, -1] = True
    found = np.empty_like(kept)
    np.put_along_axis(found, order, kept, -1)
    return found
