"""Generate inputs for a model: to trace it, and to compare artifacts on."""

import inspect
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.model_inputs import extra_inputs
from propulsion_export.errors import BaseModelError

TRACED_ROWS = 3  # rows of the batch that a model is traced with


def input_names(model_class: type, config: PretrainedConfig) -> tuple[str, ...]:
    """The inputs of an encoder: those of a text, and what else the model is for."""
    accepted = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    names = [name for name in ("input_ids", "attention_mask") if name in accepted]
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return (*names, *(extra.name for extra in extra_inputs(config) if extra.name in accepted))


def trace_inputs(names: tuple[str, ...], config: PretrainedConfig) -> Tensors:
    """One padded batch, int64 [3, length], whose sizes the tracer cannot confuse with others.

    A mask of ones would vanish from the graph, and a size of 0, 1, or one that the configuration
    also holds, would be taken for a constant. The length is no multiple of the rows either.
    """
    taken = {value for value in config.to_dict().values() if isinstance(value, int)}
    length = next(n for n in range(11, 1000) if n not in taken and n % TRACED_ROWS)
    lengths = (length, length - 4, length - 6)
    return random_batch(names, config, lengths, np.random.default_rng(0))


def trace_prompt(config: PretrainedConfig) -> Tensors:
    """A prompt to trace decoding steps after, int64 [3, length], padded on the left."""
    return padded_left(trace_inputs(("input_ids", "attention_mask"), config))


def padded_left(batch: Tensors) -> Tensors:
    """A batch with its padding moved to the left, from whichever side the tokenizer put it."""
    order = np.argsort(batch["attention_mask"], axis=1, kind="stable")
    return {
        name: np.take_along_axis(values, order.reshape(*order.shape, *[1] * (values.ndim - 2)), 1)
        for name, values in batch.items()
    }


def padding_token(config: PretrainedConfig) -> int:
    """The token at positions that the attention mask hides: padding if the vocabulary has it."""
    token = config.pad_token_id
    # Some configurations say -1, or name a token that the embedding has no row for.
    return token if token is not None and 0 <= token < vocabulary_size(config) else 0


def vocabulary_size(config: PretrainedConfig) -> int:
    """How many tokens a model has.

    Raises:
        BaseModelError: it has none: it reads characters by their code points.
    """
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise BaseModelError(
            f"{type(config).__name__}: has no vocab_size, expected a model that reads tokens",
            remedy="merge takes it; run the merged checkpoint.",
        )
    return size


def random_batch(
    names: tuple[str, ...],
    config: PretrainedConfig,
    lengths: tuple[int, ...],
    chooser: np.random.Generator,
) -> Tensors:
    """Random tokens, one row per length, int64 [rows, longest], padded on the right.

    What else a model is for is random too, int64 [rows, longest, …], and zero for padding.
    """
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    padding = padding_token(config)
    # Neither padding, wherever it stands, nor the first entries, special tokens in most models.
    size = vocabulary_size(config)
    tokens = chooser.integers(size // 20, size - 1, shape)
    tokens += tokens >= padding
    tensors = {
        "input_ids": np.where(mask == 1, tokens, padding).astype(np.int64),
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
    }
    for extra in extra_inputs(config):
        if extra.name in names:
            drawn = extra.draw(chooser, shape)
            hidden = mask.reshape(*shape, *[1] * (extra.dimensions - 2))
            tensors[extra.name] = np.where(hidden == 1, drawn, 0)
    return {name: tensors[name] for name in names}


def with_one_eos(batch: Tensors, config: PretrainedConfig) -> dict[str, np.ndarray[Any, Any]]:
    """A batch padded on the right whose rows have one end-of-sequence token each, as the last."""
    ids, end = batch["input_ids"].copy(), config.eos_token_id
    others = (t for t in range(config.vocab_size) if t not in (end, padding_token(config)))
    ids[ids == end] = next(others)
    ids[np.arange(len(ids)), batch["attention_mask"].sum(axis=1) - 1] = end
    return {**batch, "input_ids": ids}
