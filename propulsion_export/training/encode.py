"""Encode examples as token ids and class numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from propulsion_export.base_model.tokenizer.words import first_tokens, joined
from propulsion_export.errors import BaseModelError
from propulsion_export.training.data import Example

IGNORED = -100  # the class number that torch's cross-entropy skips

EncodedRow = dict[str, Any]
Batch = dict[str, torch.Tensor]
Collate = Callable[[list[EncodedRow]], Batch]


@dataclass(frozen=True)
class Rows:
    """Encoded examples to train and to validate on, and the function that makes batches of them."""

    training: Sequence[EncodedRow]
    validation: Sequence[EncodedRow]
    collate: Collate


def encode(
    examples: Sequence[Example], classes: Sequence[str], tokenizer: Any, max_length: int
) -> list[EncodedRow]:
    """Encode each example as model inputs and `labels`, cut to `max_length` tokens, not padded.

    In token classification words are encoded as a text, joined by spaces, so that they have the
    tokens that the model gets when it is run. The first token of each word carries its class, all
    others `IGNORED`.

    Raises:
        BaseModelError: a token holds parts of two words, or a text has no tokens.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    encoded = tokenizer(
        [joined(example.text) for example in examples],
        truncation=True,
        max_length=max_length,
    )
    _check_tokens(examples, encoded["input_ids"])
    return [
        {name: values[index] for name, values in encoded.items()}
        | {"labels": _labels(example, numbers, encoded, index)}
        for index, example in enumerate(examples)
    ]


def _check_tokens(examples: Sequence[Example], tokens: Sequence[Sequence[int]]) -> None:
    empty = [example for example, own in zip(examples, tokens, strict=True) if not len(own)]
    if empty:
        raise BaseModelError(
            f"the tokenizer of the base model reads no tokens in {len(empty)} of {len(examples)} "
            f"texts, such as {joined(empty[0].text)[:40]!r}, expected some in each",
            remedy="Is it the tokenizer that the model was trained with?",
        )


def _labels(example: Example, numbers: dict[str, int], encoded: Any, index: int) -> int | list[int]:
    if isinstance(example.label, str):
        return numbers[example.label]
    encoding = encoded.encodings[index]
    labels = [IGNORED] * len(encoding)
    for name, token in zip(example.label, first_tokens(example.text, encoding), strict=True):
        if token is not None:
            labels[token] = numbers[name]
    return labels
