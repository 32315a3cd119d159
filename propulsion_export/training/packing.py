"""Pack short rows into blocks of one length, so that few tokens are padding.

The positions of each row start at 0. Without an attention mask, transformers takes a position that
does not follow the one before it as the start of another row, and lets no row attend to another.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from propulsion_export.training.encode import IGNORED, Batch, EncodedRow


def pack_rows(rows: Sequence[EncodedRow], length: int) -> list[EncodedRow]:
    """Pack rows into blocks of at most `length` tokens, the longest first, each where it fits best.

    Args:
        rows: rows with `input_ids` and `labels`, none longer than `length`; the first label of
            each must be `IGNORED`, or the row before would learn to predict it.
        length: the number of tokens in a block.
    """
    blocks: list[list[EncodedRow]] = []
    rooms: list[tuple[int, int]] = []  # room left and number of each block, sorted
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        size = len(row["input_ids"])
        place = bisect_left(rooms, (size, -1))
        if place == len(rooms):
            room, number = length, len(blocks)
            blocks.append([])
        else:
            room, number = rooms.pop(place)
        blocks[number].append(row)
        insort(rooms, (room - size, number))
    return [block_of(block) for block in blocks]


def block_of(rows: Sequence[EncodedRow]) -> EncodedRow:
    """One block that holds all of these rows."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "position_ids": [place for row in rows for place in range(len(row["input_ids"]))],
    }


@dataclass(frozen=True)
class BlockCollator:
    """Makes a batch of blocks; the padding of a shorter one is a row of its own.

    Attributes:
        padding: the token id of the padding.
    """

    padding: int

    def __call__(self, blocks: list[EncodedRow]) -> Batch:
        """int64 tensors of shape [blocks, longest block], without an attention mask."""
        longest = max(len(block["input_ids"]) for block in blocks)
        missing = [longest - len(block["input_ids"]) for block in blocks]
        fill = {"input_ids": [self.padding] * longest, "labels": [IGNORED] * longest}
        fill["position_ids"] = list(range(longest))
        return {
            name: torch.tensor(
                [block[name] + values[:count] for block, count in zip(blocks, missing, strict=True)]
            )
            for name, values in fill.items()
        }
