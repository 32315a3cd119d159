"""What a session takes as inputs and names of adapters, and how it refuses the rest."""

import re

import numpy as np
import pytest
from session_inputs import KINDS, TEXTS, random_inputs

from propulsion_export.errors import ToolError, UnknownAdapterError, UsageError
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session

MASK = np.ones((2, 3), np.int64)
IDS = np.array([[5, 6, 7], [8, 9, 10]])


# Inputs, adapters and settings


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (["ba"], {"adapter": "nine"}, UnknownAdapterError, "no adapter 'nine', expected one"),
        (["ba"], {"adapter": ""}, UnknownAdapterError, "no adapter ''"),
        (["ba"] * 3, {"adapter": ["three", "five"]}, UsageError, "2 adapters for 3 rows"),
        (["ba"], {"adapter": []}, UsageError, "0 adapters for 1 rows"),
        ([], {}, UsageError, "there are no rows"),
        ({}, {}, UsageError, "there are no rows"),
        ({"input_ids": np.zeros((0, 3), np.int64)}, {}, UsageError, "there are no rows"),
        (
            {"input_ids": np.zeros((2, 3)), "attention_mask": np.zeros((1, 3))},
            {},
            UsageError,
            r"input_ids \[2, 3\], attention_mask \[1, 3\], expected as many rows each",
        ),
        (
            {"input_ids": np.zeros((2, 3), np.int64)},
            {},
            UsageError,
            "the inputs are input_ids, expected attention_mask besides",
        ),
        (["ba", "be"], {"context": ["be"] * 3}, UsageError, "3 contexts for 2 rows"),
        (["ba"], {"settings": Settings()}, UsageError, "settings: are for generating text, the"),
        (random_inputs(), {"settings": Settings()}, UsageError, "go with texts"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_call_is_told_in_a_line(inputs, options, error, message, kind, opened):
    with pytest.raises(error, match=message):
        opened(kind)(inputs, **options)


@pytest.mark.parametrize("kind", ["folded", "merged"])
def test_a_folded_adapter_is_the_only_one(kind, opened):
    with pytest.raises(
        UnknownAdapterError, match=r"'three' folded in, .*'five'.* --mode switchable"
    ):
        opened(kind)(TEXTS[:2], adapter=["three", "five"])


def test_contexts_are_one_for_all_or_one_each(make_task):
    session = Session(make_task("question-answering").bank)

    with pytest.raises(UsageError, match="2 contexts for 3 rows"):
        session(TEXTS[:3], context=["a", "b"])
    with pytest.raises(UsageError, match="no context is given"):
        session(TEXTS[:3])
    one, each = (session(TEXTS[:3], context=c) for c in ("ba be", ["ba be"] * 3))
    assert [r.prediction for r in one] == [r.prediction for r in each]


def test_names_may_be_in_a_tuple_or_an_array(banked):
    session = Session(banked)

    for adapter in (("three", "five"), np.array(["three", "five"])):
        assert [one.adapter for one in session(["ba", "be"], adapter)] == ["three", "five"]


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        (0, "adapter: is int, expected a name, or a list of one for each row"),
        (1.5, "adapter: is float"),
        (b"three", "adapter: is bytes"),
        ({"three"}, "adapter: is set"),
        ({"three": 1}, "adapter: is dict"),
        ([["three"]], "adapter 1: is list, expected a name"),
        (["three", None], "adapter 2: is NoneType, expected a name"),
        ([0, 1], "adapter 1: is int, expected a name; adapter 2: is int, expected a name"),
        (np.array(0), "adapter: is ndarray"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["switchable", "bank"])
def test_what_names_no_adapter_is_told_in_a_line(kind, adapter, found, export_world):
    session = Session(export_world(kind))

    for inputs in (["ba", "be"], {"input_ids": IDS, "attention_mask": MASK}):
        with pytest.raises(UsageError, match=re.escape(found)):
            session(inputs, adapter)


def test_what_is_no_adapter_is_neither_added_nor_removed(switchable):
    session = Session(switchable)

    with pytest.raises(UsageError, match="adapter: is int, expected a directory, or NAME=DIR"):
        session.add(0)
    with pytest.raises(UsageError, match="adapter: is list, expected a name"):
        session.remove(["three"])


# Texts and tensors


def test_a_number_that_is_no_token_is_told_in_a_line(banked):
    inputs = {"input_ids": [[5, 9_999]], "attention_mask": [[1, 1]]}

    with pytest.raises(ToolError, match=r"the model failed on inputs input_ids \[1, 2\], .*"):
        Session(banked)(inputs, "five")


def test_tensors_are_taken_as_a_tokenizer_or_torch_gives_them(banked):
    session = Session(banked)
    whole = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": 0 * MASK}
    expected = session(whole, adapter=["three", "five"])

    for inputs in (
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": IDS.astype(np.int32), "attention_mask": MASK.astype(bool)},
        {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()},
    ):
        for reply, other in zip(session(inputs, adapter=["three", "five"]), expected, strict=True):
            np.testing.assert_array_equal(reply.outputs["logits"], other.outputs["logits"])


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({"adapter_ids": IDS}, "the input 'adapter_ids' is unknown, expected only"),
        (
            {"input_ids": IDS.astype(float)},
            r"input_ids: is float64 \[2, 3\], expected whole",
        ),
        ({"attention_mask": MASK[:, 0]}, r"attention_mask: is int64 \[2\], expected whole numbers"),
        (
            {"attention_mask": np.ones((2, 7), int)},
            r"attention_mask \[2, 7\], .*expected one shape",
        ),
        ({"input_ids": -MASK}, "input_ids: has -1, expected no number below zero"),
        ({"input_ids": [[1, 2, 3], [4, 5]]}, "input_ids: has rows of different lengths"),
        ({"token_type_ids": 0 * MASK[:, :2]}, r"token_type_ids \[2, 2\], expected one shape"),
    ],
)
def test_tensors_that_the_model_would_not_take_are_told_in_a_line(inputs, found, banked):
    with pytest.raises(UsageError, match=found):
        Session(banked)({"input_ids": IDS, "attention_mask": MASK, **inputs})


@pytest.mark.parametrize(
    ("text", "found"),
    [("ba \ud800 ce", "text 2: holds half a character"), (None, "text 2: is NoneType")],
)
def test_what_no_tokenizer_reads_is_told_in_a_line(text, found, banked):
    with pytest.raises(UsageError, match=found):
        Session(banked)(["ba", text], adapter="three")


@pytest.mark.parametrize(
    "inputs", [0, None, b"ba", {"ba", "be"}, iter(["ba"]), np.array("ba")], ids=type
)
def test_what_is_neither_texts_nor_tensors_is_told_in_a_line(inputs, banked):
    found = f"the inputs are {type(inputs).__name__}, expected a text, a list of texts, or tensors"

    with pytest.raises(UsageError, match=found):
        Session(banked)(inputs)
