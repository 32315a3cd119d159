"""Rows lie in blocks whole, each once, and see nothing of each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.training.encode import IGNORED
from propulsion_export.training.losses import mean_next_token_loss, next_token_losses
from propulsion_export.training.packing import BlockCollator, block_of, pack_rows


def row_of(length, first):
    ids = [first + place for place in range(length)]
    return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}


def rows_in(block):
    """The rows that a block holds, taken apart where its positions start again."""
    starts = [place for place, position in enumerate(block["position_ids"]) if position == 0]
    ends = [*starts[1:], len(block["position_ids"])]
    return [
        {name: block[name][start:end] for name in ("input_ids", "labels")}
        for start, end in zip(starts, ends, strict=True)
    ]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=30))
def test_every_row_is_in_one_block_and_none_is_too_long(lengths):
    rows = [row_of(length, 100 * number) for number, length in enumerate(lengths)]

    blocks = pack_rows(rows, 12)

    packed = [row for block in blocks for row in rows_in(block)]
    assert sorted(packed, key=lambda row: row["input_ids"]) == rows
    sizes = [len(block["input_ids"]) for block in blocks]
    assert max(sizes) <= 12
    # Two blocks that are half empty would be one.
    assert sum(size <= 6 for size in sizes) <= 1


def test_a_row_goes_where_it_fits_best():
    rows = [row_of(length, 100 * length) for length in (9, 7, 5, 3)]

    sizes = [[len(row["input_ids"]) for row in rows_in(block)] for block in pack_rows(rows, 12)]

    assert sizes == [[9, 3], [7, 5]]


def test_a_batch_is_filled_up_with_what_is_not_learnt():
    batch = BlockCollator(padding=9)(
        [block_of([row_of(2, 1), row_of(2, 5)]), block_of([row_of(3, 1)])]
    )

    assert batch["input_ids"].tolist() == [[1, 2, 5, 6], [1, 2, 3, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, 6], [IGNORED, 2, 3, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "mistral", "gemma3", "mixtral"])
def test_rows_in_a_block_have_the_losses_they_have_alone(kind, tiny_model):
    model = tiny_model(kind)
    rows = [row_of(length, 10 * length) for length in (7, 5, 4, 3)]
    collate = BlockCollator(padding=0)

    def losses(blocks):
        batch = collate(blocks)
        labels = batch.pop("labels")
        outputs = model(**batch, use_cache=False)
        kept = next_token_losses(outputs.logits, labels)[labels != IGNORED]
        return kept, mean_next_token_loss(outputs, labels)

    together, mean = losses([block_of(rows)])
    alone, _ = losses([block_of([row]) for row in rows])

    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean, alone.mean())
    run_on = block_of(rows)
    run_on["position_ids"] = list(range(len(run_on["position_ids"])))
    leaking, _ = losses([run_on])
    assert (leaking - alone)[6:].abs().max() > 0.01
