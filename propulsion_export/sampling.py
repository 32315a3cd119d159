"""Inputs made for a model: to trace it with, and to judge it by."""

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from propulsion_export.artifact import Tensors
from propulsion_export.lengths import longest_input
from propulsion_export.scales import Array

_LONGEST = 48
_BATCHES, _ROWS = 4, 4
TRACED_ROWS = 3  # of a batch to trace with
_FEWEST_DECODED = 7  # of a causal model, so that a step has tokens of its own before it
_DECODED = 8


def input_names(model_class: type, config: PretrainedConfig) -> tuple[str, ...]:
    """Which of the usual encoder inputs a model reads, in the order of its forward."""
    accepted = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    names = [name for name in ("input_ids", "attention_mask") if name in accepted]
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return tuple(names)


def trace_inputs(names: tuple[str, ...], config: PretrainedConfig) -> Tensors:
    """One padded batch, int64 [3, length], whose sizes the tracer cannot confuse with others.

    A mask of ones would vanish from the graph, and a size of 0, 1, or one that the configuration
    also holds, would be taken for a constant. The length is no multiple of the rows either.
    """
    taken = {value for value in config.to_dict().values() if isinstance(value, int)}
    length = next(n for n in range(11, 1000) if n not in taken and n % TRACED_ROWS)
    lengths = (length, length - 4, length - 6)
    return _batch(names, config, lengths, np.random.default_rng(0))


def trace_prompt(config: PretrainedConfig) -> Tensors:
    """A prompt to trace decoding behind, int64 [3, length], padded on the left."""
    return padded_left(trace_inputs(("input_ids", "attention_mask"), config))


def parity_inputs(
    names: tuple[str, ...], config: PretrainedConfig, *, seed: int, longest: int | None = None
) -> tuple[Tensors, ...]:
    """4 padded batches of 4 rows of random tokens, of 3 to `longest` tokens, 16 inputs in all."""
    chooser = np.random.default_rng(seed)
    longest = min(longest or _LONGEST, longest_input(config))
    return tuple(
        _batch(names, config, tuple(chooser.integers(3, longest + 1, _ROWS)), chooser)
        for _ in range(_BATCHES)
    )


def decoder_inputs(
    config: PretrainedConfig, *, seed: int, longest: int | None = None
) -> tuple[Tensors, ...]:
    """4 batches of 4 rows of random tokens, of 7 to `longest`, padded on the left."""
    chooser = np.random.default_rng(seed)
    longest = min(longest or _LONGEST, longest_input(config))
    names = ("input_ids", "attention_mask")
    drawn = (chooser.integers(_FEWEST_DECODED, longest + 1, _ROWS) for _ in range(_BATCHES))
    return tuple(padded_left(_batch(names, config, tuple(each), chooser)) for each in drawn)


def with_decoder_tokens(
    batches: Iterable[Tensors], config: PretrainedConfig, *, seed: int
) -> tuple[Tensors, ...]:
    """The batches with `decoder_input_ids`, int64 [rows, 8]: the first token, 7 random ones."""
    chooser = np.random.default_rng(seed + 1)
    made = []
    for batch in batches:
        lengths = (_DECODED,) * len(batch["input_ids"])
        tokens = _batch(("input_ids",), config, lengths, chooser)["input_ids"]
        made.append({**batch, "decoder_input_ids": _shifted(tokens, config)})
    return tuple(made)


def _shifted(tokens: Array, config: PretrainedConfig) -> Array:
    shifted = np.roll(tokens, 1, axis=1)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted


def padded_left(batch: Tensors) -> Tensors:
    """A batch with its padding on the left, wherever it was: some tokenizers put it there."""
    order = np.argsort(batch["attention_mask"], axis=1, kind="stable")
    return {name: np.take_along_axis(values, order, axis=1) for name, values in batch.items()}


def padding_token(config: PretrainedConfig) -> int:
    """What to feed where the attention mask hides: the padding token if the vocabulary has it."""
    token = config.pad_token_id
    # Some configurations say -1, or name a token that the embedding has no row for.
    return token if token is not None and 0 <= token < config.vocab_size else 0


def text_inputs(names: tuple[str, ...], tokenizer: Any, texts: list[str], limit: int) -> Tensors:
    """Tokenized texts as one padded int64 batch [len(texts), longest], cut at `limit` tokens."""
    return tensors_of(names, encode_texts(names, tokenizer, texts, limit=limit))


def tensors_of(names: tuple[str, ...], encoding: Any) -> Tensors:
    """The arrays of an encoding that a model reads, int64 [rows, length]."""
    return {name: encoding[name].astype(np.int64) for name in names}


def encode_texts(
    names: tuple[str, ...],
    tokenizer: Any,
    texts: list[str],
    *,
    limit: int,
    contexts: list[str] | None = None,
) -> Any:
    """What the tokenizer makes of texts, as transformers' BatchEncoding of one padded batch.

    Args:
        names: of the arrays wanted.
        tokenizer: of the model.
        texts: one a row.
        limit: in tokens; the longer of text and context is cut.
        contexts: a second text for each row, where the answer to the first is looked for.
    """
    return tokenizer(
        texts,
        contexts,
        truncation=True,
        max_length=limit,
        padding=True,
        # Not every tokenizer makes them by itself, and a graph requires what its model reads.
        return_token_type_ids="token_type_ids" in names,
        return_attention_mask=True,
        return_tensors="np",
    )


def _batch(
    names: tuple[str, ...],
    config: PretrainedConfig,
    lengths: tuple[int, ...],
    chooser: np.random.Generator,
) -> Tensors:
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    padding = padding_token(config)
    # Neither padding, wherever it stands, nor the first entries, special tokens in most models.
    tokens = chooser.integers(config.vocab_size // 20, config.vocab_size - 1, shape)
    tokens += tokens >= padding
    made = {
        "input_ids": np.where(mask == 1, tokens, padding).astype(np.int64),
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
    }
    return {name: made[name] for name in names}
