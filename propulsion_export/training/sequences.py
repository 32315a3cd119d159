"""Encode passages as token ids, with labels on the tokens to learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from propulsion_export.training.encode import IGNORED, EncodedRow
from propulsion_export.training.passages import Passage


@dataclass(frozen=True)
class Sequences:
    """Encoded passages; `labels` are token ids, `IGNORED` for tokens that are not learnt.

    Attributes:
        passages: how many were encoded.
        rows: the model's inputs and `labels`, not padded.
        cut: how many passages were cut to the longest length.
        left_out: how many have no row, because their prompt leaves no room for the response.
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
    Prompt and response are tokenised separately, because in use the model gets the prompt alone.

    Args:
        passages: passages that all have a prompt, or all have none.
        tokenizer: a tokenizer with an end-of-sequence token.
        longest: the number of tokens that rows are cut to.
        split: put the rest of a long text without a prompt into further rows instead of cutting it.
    """
    prompts, responses = _token_ids(passages, tokenizer)
    rows: list[EncodedRow] = []
    cut = left_out = 0
    for prompt, response in zip(prompts, responses, strict=True):
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
    # Prompts and responses get the special tokens that the tokenizer adds to each side.
    texts = tokenizer(text_target=[passage.response for passage in passages])["input_ids"]
    responses = [_ended(ids, tokenizer.eos_token_id) for ids in texts]
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": response[:longest]}
        for ids, response in zip(kept, responses, strict=True)
    ]
    cut = sum(
        max(length, len(response)) > longest
        for length, response in zip(lengths, responses, strict=True)
    )
    return Sequences(len(passages), rows, cut, 0)


def _token_ids(
    passages: Sequence[Passage], tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of the responses with an end-of-sequence token."""
    end = tokenizer.eos_token_id
    alone = passages[0].prompt is None
    texts = tokenizer([passage.response for passage in passages], add_special_tokens=alone)
    responses = [_ended(ids, end) for ids in texts["input_ids"]]
    if alone:
        return [[] for _ in passages], responses
    prompts = tokenizer([passage.prompt for passage in passages])["input_ids"]
    # A tokenizer may add an end to every text; a prompt must not have one.
    closes = tokenizer("a")["input_ids"][-1:] == [end]
    return [ids[:-1] if closes else ids for ids in prompts], responses


def _row(ids: list[int], unlearnt: int) -> EncodedRow:
    labels = [IGNORED] * unlearnt + ids[unlearnt:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _pieces(ids: list[int], longest: int) -> list[list[int]]:
    pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    return [piece for piece in pieces if len(piece) > 1]  # the first token is not learnt


def _ended(ids: list[int], end: int) -> list[int]:
    return ids if ids[-1:] == [end] else [*ids, end]
