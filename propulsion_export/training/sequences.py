"""Passages as token ids, with labels on what is to be learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from propulsion_export.training.encode import IGNORED, EncodedRow
from propulsion_export.training.passages import Passage


@dataclass(frozen=True)
class Sequences:
    """Encoded passages; `labels` are token ids, `IGNORED` where nothing is learnt.

    Attributes:
        passages: how many were encoded.
        rows: the model's inputs and `labels`, not padded.
        cut: how many passages lost their end to the longest length.
        left_out: how many have no row, because their prompt leaves nothing to learn in it.
    """

    passages: int
    rows: list[EncodedRow]
    cut: int
    left_out: int

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def encode_passages(
    passages: Sequence[Passage], tokenizer: Any, longest: int, *, split: bool = False
) -> Sequences:
    """For a decoder: the prompt, the response and the end-of-sequence token in one row.

    Labels are on the response and its end, and not on a row's first token, which nothing predicts.
    Prompt and response are tokenised apart, as they are when a model is asked to go on.

    Args:
        passages: all with a prompt, or all without.
        tokenizer: with an end-of-sequence token.
        longest: rows are cut to so many tokens.
        split: make further rows of the rest of a text without a prompt, instead of cutting it.
    """
    begun, written = _token_ids(passages, tokenizer)
    rows: list[EncodedRow] = []
    cut = left_out = 0
    for prompt, response in zip(begun, written, strict=True):
        ids, unlearnt = [*prompt, *response], max(1, len(prompt))
        if unlearnt >= min(longest, len(ids)):
            left_out += 1
        elif split and not prompt:
            rows += [_row(piece, 1) for piece in _pieces(ids, longest)]
        else:
            rows.append(_row(ids[:longest], unlearnt))
            cut += len(ids) > longest
    return Sequences(len(passages), rows, cut, left_out)


def encode_pairs(passages: Sequence[Passage], tokenizer: Any, longest: int) -> Sequences:
    """For an encoder-decoder: the prompt as its input, the response and its end as labels."""
    prompts = [passage.prompt for passage in passages]
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    kept = tokenizer(prompts, truncation=True, max_length=longest)["input_ids"]
    # Both sides get the special tokens that the tokenizer gives them.
    texts = tokenizer(text_target=[passage.response for passage in passages])["input_ids"]
    written = [_ended(ids, tokenizer.eos_token_id) for ids in texts]
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": response[:longest]}
        for ids, response in zip(kept, written, strict=True)
    ]
    cut = sum(
        max(length, len(response)) > longest
        for length, response in zip(lengths, written, strict=True)
    )
    return Sequences(len(passages), rows, cut, 0)


def _token_ids(
    passages: Sequence[Passage], tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of the texts with an end."""
    end = tokenizer.eos_token_id
    alone = passages[0].prompt is None
    texts = tokenizer([passage.response for passage in passages], add_special_tokens=alone)
    written = [_ended(ids, end) for ids in texts["input_ids"]]
    if alone:
        return [[] for _ in passages], written
    begun = tokenizer([passage.prompt for passage in passages])["input_ids"]
    # A tokenizer may end every text; the prompt is not one.
    closes = tokenizer("a")["input_ids"][-1:] == [end]
    return [ids[:-1] if closes else ids for ids in begun], written


def _row(ids: list[int], unlearnt: int) -> EncodedRow:
    labels = [IGNORED] * unlearnt + ids[unlearnt:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _pieces(ids: list[int], longest: int) -> list[list[int]]:
    pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    return [piece for piece in pieces if len(piece) > 1]  # the first token is not learnt


def _ended(ids: list[int], end: int) -> list[int]:
    return ids if ids[-1:] == [end] else [*ids, end]
