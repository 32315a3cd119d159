"""From a model's token vectors to one embedding a text, as sentence-transformers computes it.

Numbers are float64, whatever the model's precision, and rounded by the caller.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from propulsion_export.errors import UsageError

Array = npt.NDArray[Any]
TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
# In the order in which older files, which have a switch for each, concatenate them.
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

_erf = np.vectorize(math.erf, otypes=[np.float64])
# By the class of torch that a Dense names; each with torch's default arguments.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "GELU": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "SiLU": lambda x: x / (1 + np.exp(-x)),
    "LeakyReLU": lambda x: np.where(x < 0, 0.01 * x, x),
    "ELU": lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x),
}


class Step(Protocol):
    """One module of a pipeline, which adds to or changes the named vectors of one text."""

    @property
    def label(self) -> str:
        """What a reply calls it; empty for a step that is not worth a name."""

    def apply(self, vectors: dict[str, Array], prompt: int) -> dict[str, Array]:
        """The vectors after it; `prompt` is the number of tokens of the prompt before the text."""


@dataclass(frozen=True)
class Pooling:
    """Token vectors [tokens, width] become one vector for each mode, concatenated.

    Attributes:
        modes: of `MODES`.
        include_prompt: whether the prompt's tokens count.
    """

    modes: tuple[str, ...]
    include_prompt: bool = True

    @property
    def label(self) -> str:
        return ",".join(self.modes)

    def apply(self, vectors: dict[str, Array], prompt: int) -> dict[str, Array]:
        skipped = 0 if self.include_prompt else prompt
        own = vectors[TOKENS][skipped:]
        if not len(own):
            raise UsageError("a text has no token besides its prompt's, expected some to pool")
        pooled = [_pooled(mode, own, skipped) for mode in self.modes]
        return {**vectors, SENTENCE: np.concatenate(pooled)}


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation.

    Attributes:
        weight: [out, in].
        bias: [out]; None without one.
        activation: one of `ACTIVATIONS`.
        source: the vectors that it reads.
        target: the vectors that it writes.
        residual: [out, in], or None; what the input is multiplied by before it is added.
    """

    weight: Array
    bias: Array | None
    activation: str
    source: str = SENTENCE
    target: str = SENTENCE
    residual: Array | None = None
    label: str = field(default="dense", init=False)

    def apply(self, vectors: dict[str, Array], prompt: int) -> dict[str, Array]:
        del prompt
        given = vectors[self.source]
        linear = given @ self.weight.T + (0 if self.bias is None else self.bias)
        result = ACTIVATIONS[self.activation](linear)
        if self.residual is not None:
            result = result + given @ self.residual.T
        return {**vectors, self.target: result}


@dataclass(frozen=True)
class LayerNorm:
    """PyTorch's LayerNorm of the sentence's vector; `weight` and `bias` are [width]."""

    weight: Array
    bias: Array
    label: str = field(default="layernorm", init=False)

    def apply(self, vectors: dict[str, Array], prompt: int) -> dict[str, Array]:
        del prompt
        given = vectors[SENTENCE]
        centred = given - given.mean()
        normed = centred / np.sqrt(np.square(centred).mean() + 1e-5)  # PyTorch's default epsilon
        return {**vectors, SENTENCE: normed * self.weight + self.bias}


@dataclass(frozen=True)
class Normalize:
    """Vectors divided by their length, which counts as no less than 1e-12."""

    source: str = SENTENCE
    target: str = SENTENCE
    label: str = field(default="normalize", init=False)

    def apply(self, vectors: dict[str, Array], prompt: int) -> dict[str, Array]:
        del prompt
        given = vectors[self.source]
        length = np.linalg.norm(given, axis=-1, keepdims=True)
        return {**vectors, self.target: given / np.maximum(length, 1e-12)}


@dataclass(frozen=True)
class SentencePipeline:
    """How a model's texts are read and its token vectors become embeddings.

    Attributes:
        steps: the modules behind the transformer, in order.
        longest: the most tokens of a text; None where the files do not say.
        lower_case: whether texts are made lower case before the tokenizer reads them.
        prompt: what is put before every text; empty for nothing.
        dimensions: how many numbers of the embedding are kept; None for all.
    """

    steps: tuple[Step, ...]
    longest: int | None = None
    lower_case: bool = False
    prompt: str = ""
    dimensions: int | None = None

    @property
    def label(self) -> str:
        """What a reply calls it, such as `mean+normalize`."""
        return "+".join(step.label for step in self.steps if step.label)

    @property
    def skips_prompt(self) -> bool:
        """Whether the tokens of the prompt are left out."""
        pooling = (step for step in self.steps if isinstance(step, Pooling))
        return bool(self.prompt) and any(not step.include_prompt for step in pooling)

    def is_same_as(self, other: "SentencePipeline | None") -> bool:
        """Whether both give one text one embedding; a limit that only one has does not count."""
        if other is None:
            return False
        known = {limit for limit in (self.longest, other.longest) if limit is not None}
        return len(known) < 2 and _plain(self) == _plain(other)

    def embed(self, hidden: Array, prompt: int = 0) -> Array:
        """The embedding of one text, float64 [width].

        Args:
            hidden: the last hidden state at the text's own tokens, without padding,
                [tokens, width].
            prompt: how many of the first tokens are the prompt's.
        """
        vectors = {TOKENS: hidden.astype(np.float64)}
        for step in self.steps:
            vectors = step.apply(vectors, prompt)
        return vectors[SENTENCE][: self.dimensions]

    def embed_batch(self, hidden: Array, mask: Array) -> Array:
        """The embeddings of a padded batch without prompts, float64 [rows, width]."""
        rows = zip(hidden, mask == 1, strict=True)
        return np.stack([self.embed(row[own]) for row, own in rows])


# What embeds without a pipeline: no prompt, no limit, the mean of all tokens.
MEAN = SentencePipeline((Pooling(("mean",)),))


def _plain(pipeline: SentencePipeline) -> list[Any]:
    """Plain values that are equal for pipelines that compute the same; without the limit."""
    values = [value for step in pipeline.steps for value in vars(step).values()]
    values += [pipeline.label, pipeline.lower_case, pipeline.prompt, pipeline.dimensions]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in values]


def _pooled(mode: str, own: Array, skipped: int) -> Array:
    """One vector of token vectors; `skipped` is how many tokens before them are left out."""
    match mode:
        case "cls":
            return np.asarray(own[0])
        case "lasttoken":
            return np.asarray(own[-1])
        case "max":
            return np.asarray(own.max(axis=0))
        case "mean":
            return np.asarray(own.mean(axis=0))
        case "mean_sqrt_len_tokens":
            return np.asarray(own.sum(axis=0) / math.sqrt(len(own)))
    weights = np.arange(1.0, len(own) + 1) + skipped
    return np.asarray(weights @ own / weights.sum())
