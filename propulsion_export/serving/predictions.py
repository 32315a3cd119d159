"""Turn a model's outputs into predictions, by task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.sentences.pipeline import MEAN
from propulsion_export.base_model.sentences.texts import SentenceTexts
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.words import first_tokens, words_of

NO_PIPELINE = "the base has no sentence pipeline: mean over the tokens"

# The smallest probability of a label that a text is said to have, if it may have several.
LABEL_THRESHOLD = 0.5


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
        problem_type: what the logits of a text's classes mean; None where nobody says.
    """

    source: str
    tokens: Any
    ids: Any
    mask: Any
    outputs: Tensors
    labels: Sequence[str] | None
    sentence: SentenceTexts | None = None
    words: Sequence[str] | None = None
    problem_type: ProblemType | None = None


def predict_row(task: str, outcome: Outcome, tokenizer: Any) -> dict[str, Any]:
    """The prediction for one row as plain JSON values; see `Reply.has_nan` for NaN and infinity."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return _predict(task, outcome, tokenizer)


def _predict(task: str, outcome: Outcome, tokenizer: Any) -> dict[str, Any]:
    match TASKS[task].prediction:
        case "class":
            return classify(outcome.outputs["logits"], outcome.labels, outcome.problem_type)
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


def classify(
    logits: Any, labels: Sequence[str] | None, problem_type: ProblemType | None
) -> dict[str, Any]:
    """The prediction for a text, as the text-classification pipeline of transformers computes it.

    Args:
        logits: of one text, [labels or more]; those behind the labels are padding.
        labels: class names; None if there are none.
        problem_type: what the logits mean; None: that the classes exclude each other.

    Returns:
        `label` and `score`: the likeliest class and its probability, by softmax, or, of a single
        class, by sigmoid. With several labels that do not exclude each other also `problem_type`,
        `scores`, each label with its own probability, and `labels`, those whose probability is
        at least 0.5, likeliest first. In regression `score` is the output itself, with
        `problem_type`, and with `scores` if there are several.
    """
    own = np.asarray(logits, dtype=np.float64)[: len(labels) if labels else None]
    several = problem_type in ("regression", "multi_label_classification")
    if len(own) > 1 and not several:
        return _best(own, labels)
    scores = own if problem_type == "regression" else _sigmoid(own)
    names = list(labels) if labels else [f"LABEL_{number}" for number in range(len(own))]
    scored = [
        {"label": name, "score": round(float(score), 6)}
        for name, score in zip(names, scores, strict=True)
    ]
    best = scored[int(scores.argmax())]
    if not several:
        return best
    if problem_type == "regression":
        return {"problem_type": problem_type, **best} | ({"scores": scored} if len(own) > 1 else {})
    over = [names[n] for n in np.argsort(-scores, kind="stable") if scores[n] >= LABEL_THRESHOLD]
    return {"problem_type": problem_type, **best, "labels": over, "scores": scored}


def _sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(logits, -700, None)))


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
    """Softmax over the last axis, in float64; NaN where a logit is NaN or infinite."""
    wide = np.asarray(logits, dtype=np.float64)
    shares = np.exp(wide - wide.max())
    return shares / shares.sum()
