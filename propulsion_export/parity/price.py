"""The price of quantisation: how far outputs are from those of the unquantised model.

| prediction | what is compared |
|---|---|
| class, word classes, filled masks, text | the distributions over classes or tokens |
| span | the distributions of the first and the last token over the positions of a text |
| embedding | the directions of two vectors |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.base_model.sentences.pipeline import SENTENCE
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.parity.comparison import hidden_positions
from propulsion_export.parity.differences import differences
from propulsion_export.parity.reports.report import Check, Price

_CACHED = 2**16  # logits of a part


@dataclass(frozen=True)
class Meaning:
    """What the outputs of one adapter mean.

    Attributes:
        task: its name.
        labels: how many logits are classes; the others are padding. None: all.
        problem_type: of a text classifier.
    """

    task: str
    labels: int | None = None
    problem_type: ProblemType | None = None

    @classmethod
    def of(cls, artifact: Artifact, name: str) -> "Meaning":
        """What the outputs of an artifact mean with the adapter `name`, or with none."""
        entry = artifact.list_adapters().get(name, artifact.manifest.base)
        labels = None if entry.labels is None else len(entry.labels)
        return cls(artifact.manifest.task, labels, entry.problem_type)


def price_of(
    name: str,
    meaning: Meaning,
    inputs: Sequence[Tensors],
    plain: Sequence[Tensors],
    quantised: Sequence[Tensors],
) -> list[Price]:
    """The price of each output, pooled over all batches.

    Args:
        name: of the adapter, or `base`.
        meaning: what the outputs mean.
        inputs: the batches.
        plain: outputs of the unquantised model in PyTorch.
        quantised: outputs of the artifact as shipped.
    """
    kind = TASKS[meaning.task].prediction
    with np.errstate(invalid="ignore"):  # infinity minus infinity; the price is NaN then
        if kind == "embedding":
            return [_of_vectors(name, inputs, plain, quantised)]
        return [
            _of_logits(name, output, meaning, list(pairs))
            for output in plain[0]
            if output in quantised[0]
            for pairs in [_pairs(output, kind == "span", inputs, plain, quantised)]
        ]


def with_perplexity(
    price: Price, inputs: Sequence[Tensors], plain: Sequence[Tensors], quantised: Sequence[Tensors]
) -> Price:
    """The price with the perplexity of the texts that the batches are, for causal models."""
    return replace(
        price,
        perplexity=perplexity(inputs, quantised),
        unquantised_perplexity=perplexity(inputs, plain),
    )


def perplexity(inputs: Sequence[Tensors], outputs: Sequence[Tensors]) -> float:
    """The exponential of the mean negative log likelihood of a token behind others."""
    lost, count = 0.0, 0
    for batch, found in zip(inputs, outputs, strict=True):
        tokens, mask = batch["input_ids"][:, 1:], batch["attention_mask"]
        real = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
        for row, here in enumerate(real):
            logs = _log_softmax(found[LOGITS][row, :-1][here])
            lost -= float(np.take_along_axis(logs, tokens[row][here][:, None], axis=1).sum())
            count += int(here.sum())
    return float(np.exp(lost / count)) if count else float("nan")


def price_checks(prices: Sequence[Price], most: float) -> Iterator[Check]:
    """Check that the mean KL divergence of every adapter is at most `most` nats."""
    for price in prices:
        if price.kl is not None:
            detail = f"{price.output}: {price}, at most {most:g} nats are asked for on average"
            yield Check("price", price.adapter, price.kl <= most, detail)


def _pairs(
    output: str,
    positions: bool,
    inputs: Sequence[Tensors],
    plain: Sequence[Tensors],
    quantised: Sequence[Tensors],
) -> Iterator[tuple[Array, Array]]:
    """Logits of both models, [distributions, entries], in parts that a processor's cache holds."""
    hidden = hidden_positions(output, inputs, plain)
    for here, one, other in zip(hidden, plain, quantised, strict=True):
        for row, hide in enumerate(here):
            pair = one[output][row], other[output][row]
            if positions:  # the entries are the positions themselves
                yield pair[0][~hide][None], pair[1][~hide][None]
            elif pair[0].ndim == 2:
                keep = np.flatnonzero(~hide.any(axis=1))
                step = max(1, _CACHED // max(1, hide.shape[1]))
                for start in range(0, len(keep), step):
                    some = keep[start : start + step]
                    yield pair[0][some], pair[1][some]
            else:
                yield pair[0][None], pair[1][None]


def _of_logits(
    name: str, output: str, meaning: Meaning, pairs: Sequence[tuple[Array, Array]]
) -> Price:
    classes = TASKS[meaning.task].prediction in ("class", "word classes")
    if classes and meaning.labels is not None:
        pairs = [(one[:, : meaning.labels], other[:, : meaning.labels]) for one, other in pairs]
    count = sum(len(one) for one, _ in pairs)
    if meaning.problem_type == "regression" or pairs[0][0].shape[1] == 1:
        apart = [differences(*pair).mean(axis=1) for pair in pairs]
        return Price(name, output, count, difference=float(np.concatenate(apart).mean()))
    several = meaning.problem_type == "multi_label_classification"
    measured = [_divergence(*_logs(pair, several)) for pair in pairs]
    divergences = np.concatenate([each for each, _ in measured])
    agreement = np.concatenate([same for _, same in measured])
    return Price(
        name,
        output,
        count,
        kl=float(divergences.mean()),
        kl_largest=float(divergences.max()),
        agreement=float(agreement.mean()),
    )


def _logs(pair: tuple[Array, Array], several: bool) -> tuple[Array, Array]:
    """Logarithms of probabilities [distributions, groups, entries]: labels are each yes or no."""
    if not several:
        one, other = (_log_softmax(logits)[:, None] for logits in pair)
        return one, other
    one, other = (
        _log_softmax(np.stack([logits, np.zeros_like(logits)], axis=-1)) for logits in pair
    )
    return one, other


def _divergence(plain: Array, quantised: Array) -> tuple[Array, Array]:
    """KL(plain || quantised) in nats, and whether the likeliest entries agree, [distributions].

    An entry that the unquantised model rules out adds nothing.
    """
    terms = np.where(plain == -np.inf, 0.0, np.exp(plain) * (plain - quantised))
    same = (plain.argmax(-1) == quantised.argmax(-1)).all(axis=1)
    return terms.sum(axis=(1, 2)), same


def _log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    result: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def _of_vectors(
    name: str, inputs: Sequence[Tensors], plain: Sequence[Tensors], quantised: Sequence[Tensors]
) -> Price:
    output = SENTENCE if SENTENCE in plain[0] else next(iter(plain[0]))
    distances = []
    for one, other in _pairs(output, False, inputs, plain, quantised):
        first, second = one.astype(np.float64), other.astype(np.float64)
        sizes = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        distances.append(1 - (first * second).sum(axis=1) / np.where(sizes == 0, 1, sizes))
    pooled = np.concatenate(distances)
    return Price(name, output, len(pooled), cosine_distance=float(pooled.mean()))


def is_judgeable(task: str) -> bool:
    """Whether the outputs of a task are distributions, which a divergence can compare."""
    return TASKS[task].prediction != "embedding"
