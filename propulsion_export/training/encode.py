"""Encode examples as token ids and class numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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

    In token classification the first token of each word carries the word's class, all others
    `IGNORED`.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    encoded = tokenizer(
        [example.text for example in examples],
        is_split_into_words=isinstance(examples[0].text, list),
        truncation=True,
        max_length=max_length,
    )
    return [
        {name: values[index] for name, values in encoded.items()}
        | {"labels": _labels(example, numbers, encoded, index)}
        for index, example in enumerate(examples)
    ]


def _labels(example: Example, numbers: dict[str, int], encoded: Any, index: int) -> int | list[int]:
    if isinstance(example.label, str):
        return numbers[example.label]
    words = encoded.word_ids(index)
    return [
        IGNORED if word is None or word == before else numbers[example.label[word]]
        for before, word in zip([None, *words], words, strict=False)
    ]
