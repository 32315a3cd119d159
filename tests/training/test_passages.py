"""Rows are read as texts or as prompts with responses, and it is never guessed which."""

import json

import pytest

from propulsion_export.errors import DataError
from propulsion_export.training.data import Columns
from propulsion_export.training.passages import Passage, check_same_form, read_passages

WRITE = Columns("text-generation")
RESPOND = Columns("text2text-generation")


@pytest.fixture(name="read")
def make_read(tmp_path):
    """A function: what is read of one row with these columns."""

    def read(row, columns):
        file = tmp_path / "data.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return read_passages(file, columns)

    return read


@pytest.mark.parametrize(
    ("row", "columns", "passage"),
    [
        pytest.param({"text": "a"}, WRITE, Passage(None, "a"), id="text"),
        pytest.param({"prompt": "a", "response": "b"}, WRITE, Passage("a", "b"), id="pair"),
        pytest.param({"prompt": "a", "response": "b"}, RESPOND, Passage("a", "b"), id="respond"),
        pytest.param(
            {"prompt": "a", "text": "b"}, WRITE, Passage(None, "b"), id="text-beside-half-a-pair"
        ),
        pytest.param(
            {"body": "a", "prompt": "b", "response": "c"},
            Columns("text-generation", text="body"),
            Passage(None, "a"),
            id="only-the-text-named",
        ),
        pytest.param(
            {"prompt": "a", "answer": "b", "text": "c"},
            Columns("text-generation", label="answer"),
            Passage("a", "b"),
            id="only-the-response-named",
        ),
        pytest.param(
            {"question": "a", "answer": "b"},
            Columns("text-generation", text="question", label="answer"),
            Passage("a", "b"),
            id="both-named",
        ),
    ],
)
def test_the_columns_tell_the_form(row, columns, passage, read):
    assert read(row, columns) == [passage]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        pytest.param(
            {"prompt": "a", "response": "b", "text": "c"},
            WRITE,
            "has the columns 'prompt', 'response' and 'text', expected either prompts with "
            "responses or texts. Choose with --label-column response or with --text-column text.",
            id="both-forms",
        ),
        pytest.param(
            {"prompt": "a"},
            WRITE,
            "has neither 'text' nor both 'prompt' and 'response', found 'prompt'. Name",
            id="neither-form",
        ),
        pytest.param(
            {"text": "a"}, RESPOND, "has no column 'prompt', found 'text'", id="texts-to-respond-to"
        ),
        pytest.param(
            {"text": "a"},
            Columns("text-generation", text="body"),
            "has no column 'body', found 'text'. Name the column with --text-column.",
            id="text-not-there",
        ),
        pytest.param(
            {"prompt": " ", "response": "b"},
            WRITE,
            "line 1: prompt is empty, expected a text",
            id="empty-prompt",
        ),
        pytest.param(
            {"prompt": "a", "response": 3},
            WRITE,
            "line 1: response is 3, expected a string",
            id="response-is-a-number",
        ),
        pytest.param({"text": ""}, WRITE, "line 1: text is empty", id="empty-text"),
    ],
)
def test_what_cannot_be_learnt_is_named(row, columns, message, read):
    with pytest.raises(DataError) as caught:
        read(row, columns)

    assert message in str(caught.value)


def test_texts_do_not_validate_what_was_trained_on_responses(tmp_path):
    texts, pairs = [Passage(None, "a")], [Passage("a", "b")]

    with pytest.raises(DataError, match="holds texts, expected prompts with responses, as the"):
        check_same_form(tmp_path, texts, pairs)
    check_same_form(tmp_path, pairs, pairs)
