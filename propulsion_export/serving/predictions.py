"""Turn a model's outputs into predictions, by task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.sentence_pipeline import MEAN
from propulsion_export.base_model.sentence_texts import SentenceTexts
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.words import first_tokens, words_of

NO_PIPELINE = "the base has no sentence pipeline: mean over the tokens"


@dataclass(frozen=True)
class Outcome:
    """One row of a batch: its inputs and outputs.

    Attributes:
        source: the text that the tokens' character offsets refer to: for question answering the
            context.
        tokens: the row as `tokenizers.Encoding`; None from a tokenizer that is not a fast one.
        ids: token numbers, int64 [length].
        mask: bool [length], False for padding.
        outputs: the row's outputs by name, without the batch axis.
        labels: class names; None if there are none.
        sentence: how an embedding is made of the tokens' vectors; None where the base has no
            sentence pipeline.
        words: the words that `source` was joined of; None for a text.
    """

    source: str
    tokens: Any
    ids: Any
    mask: Any
    outputs: Tensors
    labels: Sequence[str] | None
    sentence: SentenceTexts | None = None
    words: Sequence[str] | None = None


def predict_row(task: str, outcome: Outcome, tokenizer: Any) -> dict[str, Any]:
    """The prediction for one row as plain JSON values."""
    match TASKS[task].prediction:
        case "class":
            return _best(outcome.outputs["logits"], outcome.labels)
        case "word classes":
            return {"tokens": _words(outcome)}
        case "span":
            return _answer(outcome)
        case "filled masks":
            return {"filled": _filled(outcome, tokenizer)}
        case "embedding":
            return _embedding(outcome)
        case "text":
            raise AssertionError("text is generated, see `generation`")


def _embedding(outcome: Outcome) -> dict[str, Any]:
    """The text's embedding, computed in float64, and by which pooling."""
    hidden = outcome.outputs["last_hidden_state"][outcome.mask]
    if outcome.sentence is None:
        values, pooling = MEAN.embed(hidden), {"pooling": MEAN.label, "note": NO_PIPELINE}
    else:
        values = outcome.sentence.embed(hidden)
        pooling = {"pooling": outcome.sentence.pipeline.label}
    return {"embedding": [round(float(value), 6) for value in values], **pooling}


def _best(logits: Any, labels: Sequence[str] | None) -> dict[str, Any]:
    """The likeliest class and its probability, among the adapter's own labels only."""
    shares = _shares(np.asarray(logits)[: len(labels) if labels else None])
    best = int(shares.argmax())
    return {
        "label": labels[best] if labels else f"LABEL_{best}",
        "score": round(float(shares[best]), 6),
    }


def _words(outcome: Outcome) -> list[dict[str, Any]]:
    """Each word with the class of its first sub-word, the one that training gives a class."""
    if outcome.words is not None:
        firsts = first_tokens(outcome.words, outcome.tokens)
        return [_word(outcome, *pair) for pair in zip(outcome.words, firsts, strict=True)]
    return [
        _word(outcome, outcome.source[word.start : word.end], word.token)
        for word in words_of(outcome.source, outcome.tokens)
    ]


def _word(outcome: Outcome, word: str, token: int | None) -> dict[str, Any]:
    """A word with its class; without one where the model has not read it."""
    if token is None:
        return {"word": word, "label": None, "score": 0.0}
    return {"word": word, **_best(outcome.outputs["logits"][token], outcome.labels)}


def _answer(outcome: Outcome) -> dict[str, Any]:
    """The likeliest span of the context: its text, its characters, and its probability."""
    context = [token for token, text in enumerate(outcome.tokens.sequence_ids) if text == 1]
    if not context:  # cut away
        return {"answer": "", "start": 0, "end": 0, "score": 0.0}
    starts = _shares(outcome.outputs["start_logits"][context])
    ends = _shares(outcome.outputs["end_logits"][context])
    # For each end, the likeliest start that is not behind it.
    spans = np.maximum.accumulate(starts) * ends
    last = int(spans.argmax())
    first = int(starts[: last + 1].argmax())
    start = outcome.tokens.offsets[context[first]][0]
    end = outcome.tokens.offsets[context[last]][1]
    return {
        "answer": outcome.source[start:end],
        "start": start,
        "end": end,
        "score": round(float(spans[last]), 6),
    }


def _filled(outcome: Outcome, tokenizer: Any) -> list[str]:
    places = np.flatnonzero(outcome.ids == tokenizer.mask_token_id)
    best = (int(outcome.outputs["logits"][place].argmax()) for place in places)
    return [tokenizer.decode([token]).strip() for token in best]


def _shares(logits: Any) -> Any:
    """Softmax over the last axis, in float64; NaN where a logit is NaN or overflows."""
    wide = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        shares = np.exp(wide - wide.max())
        return shares / shares.sum()
