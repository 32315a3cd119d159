"""Rules of a model's generation settings that change its logits, as in transformers' generate().

Each is the numpy form of the logits processor of the same setting; `rules_of` has them in the
order of transformers 5.24. A rule sees the row's own tokens without padding, so that a row's text
does not depend on the rest of its batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.base_model.generation_settings import GenerationSettings

# From the decoder's tokens so far, int64 [length], and the scores of the next one, float32
# [vocabulary], to its new scores.
Rule = Callable[[Array, Array], Array]
_LEAST_PENALTY = 1e-6  # transformers refuses 0


@dataclass(frozen=True)
class Row:
    """One row before its first new token.

    Attributes:
        prompt: the tokens of its prompt, int64 [length].
        read: how many tokens its decoder reads first.
        room: the most new tokens.
        ends: the tokens that each end the text.
    """

    prompt: Array
    read: int
    room: int
    ends: Sequence[int]


def rules_of(settings: GenerationSettings, row: Row) -> list[Rule]:
    """The rules of a row, in the order in which they are applied.

    Raises:
        ArtifactError: a setting has a value that cannot be used.
    """
    return [
        *_bias_rules(settings, "sequence_bias", _biases(settings)),
        *_penalty_rules(settings, row),
        *_repetition_rules(settings, row),
        *_bias_rules(settings, "bad_words_ids", _bad_words(settings, row)),
        *_length_rules(settings, row),
        *_forced_rules(settings, row),
        *([_finite] if settings.applied().get("remove_invalid_values") is True else []),
        *_decay_rules(settings, row),
        *_suppressing_rules(settings, row),
    ]


def apply_rules(rules: Sequence[Rule], tokens: Array, scores: Array) -> Array:
    """The scores of the next token, float32 [vocabulary], after all rules; see `Rule`."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinite scores are as in transformers
        for rule in rules:
            scores = rule(tokens, scores)
    return scores


def _penalty_rules(settings: GenerationSettings, row: Row) -> Iterator[Rule]:
    """Make tokens of the prompt likelier, and tokens that were there already less likely."""
    of_prompt = settings.number("encoder_repetition_penalty", least=_LEAST_PENALTY)
    if of_prompt is not None:
        yield lambda tokens, scores: _penalised(scores, row.prompt, 1 / of_prompt)
    penalty = settings.number("repetition_penalty", least=_LEAST_PENALTY)
    if penalty is not None:
        yield lambda tokens, scores: _penalised(scores, tokens, penalty)


def _penalised(scores: Array, tokens: Array, penalty: float) -> Array:
    changed = scores.copy()
    known = tokens[tokens < len(scores)]
    old = scores[known]
    changed[known] = np.where(old < 0, old * penalty, old / penalty)
    return changed


def _repetition_rules(settings: GenerationSettings, row: Row) -> Iterator[Rule]:
    """No sequence of so many tokens twice, and none of the prompt."""
    size = int(settings.number("no_repeat_ngram_size") or 0)
    if size:
        yield lambda tokens, scores: _without_repeats(tokens, tokens, scores, size)
    of_prompt = int(settings.number("encoder_no_repeat_ngram_size") or 0)
    if of_prompt:
        yield lambda tokens, scores: _without_repeats(row.prompt, tokens, scores, of_prompt)


def _without_repeats(source: Array, tokens: Array, scores: Array, size: int) -> Array:
    """Forbid the tokens that would complete a sequence of `size` tokens of `source`."""
    if len(source) < size or len(tokens) < size - 1:
        return scores
    windows = np.lib.stride_tricks.sliding_window_view(source, size)
    matching = (windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(1)
    return _without(scores, windows[matching, -1])


def _biases(settings: GenerationSettings) -> list[tuple[list[int], float]]:
    value = settings.applied().get("sequence_bias", [])
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise settings.wrong("sequence_bias", "a list of pairs of tokens and a number")
    if not all(_are_tokens(tokens) and isinstance(bias, float) for tokens, bias in pairs):
        raise settings.wrong("sequence_bias", "a list of pairs of tokens and a number")
    return [(tokens, bias) for tokens, bias in pairs]


def _bad_words(settings: GenerationSettings, row: Row) -> list[tuple[list[int], float]]:
    words = settings.applied().get("bad_words_ids", [])
    if not isinstance(words, list) or not all(map(_are_tokens, words)):
        raise settings.wrong("bad_words_ids", "a list of lists of tokens")
    ends = [[end] for end in row.ends]
    return [(word, -np.inf) for word in words if word not in ends]


def _are_tokens(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token) is int and token >= 0 for token in value)
    )


def _bias_rules(
    settings: GenerationSettings, name: str, biases: Sequence[tuple[list[int], float]]
) -> Iterator[Rule]:
    """Add to the score of a token that completes a sequence."""
    if not biases:
        return

    def rule(tokens: Array, scores: Array) -> Array:
        if any(token >= len(scores) for sequence, _ in biases for token in sequence):
            raise settings.wrong(name, f"tokens below {len(scores)}")
        bias = np.zeros_like(scores)
        for (*before, last), by in biases:
            start = len(tokens) - len(before)
            if start >= 0 and (tokens[start:] == np.array(before, np.int64)).all():
                bias[last] += by
        changed: Array = scores + bias
        return changed

    yield rule


def _length_rules(settings: GenerationSettings, row: Row) -> Iterator[Rule]:
    """No end before so many tokens, counted with those read first or without."""
    if not row.ends:
        return
    if (least := settings.number("min_length")) is not None:
        yield _no_end_before(row, least)
    if (least := settings.number("min_new_tokens")) is not None:
        yield _no_end_before(row, row.read + least)


def _no_end_before(row: Row, least: float) -> Rule:
    return lambda tokens, scores: _without(scores, row.ends) if len(tokens) < least else scores


def _forced_rules(settings: GenerationSettings, row: Row) -> Iterator[Rule]:
    """The token after a single first one, and the last token that there is room for."""
    if begin := settings.tokens("forced_bos_token_id"):
        yield _forced(settings, "forced_bos_token_id", begin[:1], 1)
    if end := settings.tokens("forced_eos_token_id"):
        yield _forced(settings, "forced_eos_token_id", end, row.read + row.room - 1)


def _forced(settings: GenerationSettings, name: str, forced: Sequence[int], length: int) -> Rule:
    def rule(tokens: Array, scores: Array) -> Array:
        if len(tokens) != length:
            return scores
        if max(forced) >= len(scores):
            raise settings.wrong(name, f"tokens below {len(scores)}")
        changed = np.full_like(scores, -np.inf)
        changed[list(forced)] = 0
        return changed

    return rule


def _finite(tokens: Array, scores: Array) -> Array:
    changed: Array = np.nan_to_num(scores, nan=0.0)  # infinity becomes the largest float32
    return changed


def _decay_rules(settings: GenerationSettings, row: Row) -> Iterator[Rule]:
    """Make the end likelier with every token behind the first so many."""
    value = settings.applied().get("exponential_decay_length_penalty")
    if value is None or not row.ends:
        return
    numbers = isinstance(value, list) and len(value) == 2
    if not numbers or not all(isinstance(number, int | float) for number in value):
        raise settings.wrong("exponential_decay_length_penalty", "a length and a factor")
    start, factor = value

    def rule(tokens: Array, scores: Array) -> Array:
        behind = len(tokens) - row.read - start
        if behind <= 0:
            return scores
        changed, ends = scores.copy(), [end for end in row.ends if end < len(scores)]
        grown = float(np.float64(factor) ** behind)  # infinity where Python's own would raise
        more = np.abs(scores[ends]) * (grown - 1)
        changed[ends] += np.where(np.isfinite(scores[ends]), more, 0)
        return changed

    yield rule


def _suppressing_rules(settings: GenerationSettings, row: Row) -> Iterator[Rule]:
    """Tokens that never come, and tokens that do not come first."""
    never = settings.tokens("suppress_tokens")
    if never:
        yield lambda tokens, scores: _without(scores, never)
    not_first = settings.tokens("begin_suppress_tokens")
    if not_first:
        forced = row.read == 1 and bool(settings.tokens("forced_bos_token_id"))
        first = row.read + forced
        yield lambda tokens, scores: _without(scores, not_first) if len(tokens) == first else scores


def _without(scores: Array, tokens: Sequence[int] | Array) -> Array:
    changed = scores.copy()
    numbers = np.asarray(tokens, np.int64)
    changed[numbers[numbers < len(scores)]] = -np.inf
    return changed
