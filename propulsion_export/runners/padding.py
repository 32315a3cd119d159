"""Rows of different lengths in one batch, padded on one side."""

from collections.abc import Sequence

import numpy as np

from propulsion_export.adapters.scales import Array


def positions(mask: Array) -> Array:
    """Position of every token, int64 of the mask's shape: padding does not count."""
    counted: Array = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return counted


def last_of_rows(logits: Array, mask: Array) -> Array:
    """The logits [batch, vocabulary] of each row's last token, of all [batch, length, vocabulary].

    Args:
        logits: of each position.
        mask: int64 [batch, length], 0 for padding.
    """
    behind = np.argmax(mask[:, ::-1] == 1, axis=1)
    last: Array = logits[np.arange(len(logits)), mask.shape[1] - 1 - behind]
    return last


def pad_left(rows: Sequence[Array], padding: int) -> dict[str, Array]:
    """Rows of different lengths as `input_ids` and `attention_mask`, int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    tokens = np.full((len(rows), longest), padding, np.int64)
    mask = np.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def pad_right(rows: Sequence[Array], padding: int) -> dict[str, Array]:
    """As `pad_left`, the padding behind each row."""
    flipped = pad_left([row[::-1] for row in rows], padding)
    return {name: values[:, ::-1].copy() for name, values in flipped.items()}
