"""Data that cannot be used stop a training after hours, and data that could be used are refused.

Half characters, columns of one name and foreign separators are named with file and row when the
file is read; long cells are data.
"""

import json

import pyarrow
import pyarrow.parquet
import pytest

from propulsion_export.errors import DataError, UsageError
from propulsion_export.serving.requests import check_texts, contexts_for
from propulsion_export.training.data import Columns, Example, read_examples
from propulsion_export.training.passages import Passage, read_passages

TEXT = Columns("text-classification")
WORDS = Columns("token-classification")
PASSAGES = Columns("text-generation")
GOOD = {"text": "a", "label": "x", "tokens": ["a", "b"], "labels": ["x", "y"]}
GOOD |= {"prompt": "a", "response": "b"}
HALF = "a\ud83d"


def write(file, *rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


# Half characters


@pytest.mark.parametrize(
    ("columns", "changed", "place"),
    [
        (TEXT, {"text": HALF}, "text"),
        (TEXT, {"label": HALF}, "label"),
        (WORDS, {"tokens": ["a", HALF]}, "tokens[1]"),
        (WORDS, {"labels": [HALF, "y"]}, "labels[0]"),
        (PASSAGES, {"prompt": HALF}, "prompt"),
        (PASSAGES, {"response": HALF}, "response"),
    ],
)
def test_half_a_character_is_refused_with_file_and_row(columns, changed, place, tmp_path):
    own = {"prompt", "response"} if columns is PASSAGES else {"text", "label", "tokens", "labels"}
    good = {name: value for name, value in GOOD.items() if name in own}
    file = write(tmp_path / "data.jsonl", good, good | changed)
    read = read_passages if columns is PASSAGES else read_examples

    with pytest.raises(DataError) as caught:
        read(file, columns)

    assert str(caught.value) == (
        f"{file}: line 2: {place} holds half a character (the lone surrogate \\ud83d at 1), "
        "expected whole ones. Correct or remove these rows."
    )


def test_whole_characters_and_other_columns_are_no_matter(tmp_path):
    whole = '{"text": "\\ud83d\\ude00", "label": "\\u00e9", "note": "\\ud83d"}'
    (tmp_path / "data.jsonl").write_text(whole)

    assert read_examples(tmp_path / "data.jsonl", TEXT) == [Example("\U0001f600", "\u00e9")]


def test_text_in_a_call_is_refused_as_before():
    with pytest.raises(UsageError, match="text 2: holds half a character"):
        check_texts(["a", HALF], "text-classification")


def test_parquet_that_is_no_utf8_is_one_line(tmp_path):
    text = pyarrow.array([b"a", b"\xff"]).cast(pyarrow.string(), safe=False)
    table = pyarrow.table({"text": text, "label": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")

    with pytest.raises(DataError, match=r"data.parquet: is no readable Parquet file \("):
        read_examples(tmp_path / "data.parquet", TEXT)


# CSV


@pytest.mark.parametrize("length", [131_072, 131_073, 1_000_000])
def test_a_cell_may_be_long(length, tmp_path):
    (tmp_path / "data.csv").write_text(f"text,label\n{'a' * length},x\nb,y\n")

    [first, _] = read_examples(tmp_path / "data.csv", TEXT)

    assert len(first.text) == length


@pytest.mark.parametrize(
    ("separator", "name"), [(";", "a semicolon"), ("\t", "a tab"), ("|", "a vertical bar")]
)
@pytest.mark.parametrize("row", ["a{}x", '"one, two"{}x', "1,5{}x"])
def test_another_separator_is_named(separator, name, row, tmp_path):
    file = tmp_path / "data.csv"
    file.write_text(f"text{separator}label\n{row.format(separator)}\n")

    with pytest.raises(DataError) as caught:
        read_examples(file, TEXT)

    assert str(caught.value) == (
        f"{file}: has the columns {f'text{separator}label'!r} separated by {name}, expected commas."
        " Save it as CSV with commas."
    )


def test_separators_in_cells_and_among_commas_are_text(tmp_path):
    (tmp_path / "data.csv").write_text("text;note,text,label\na;b,c;d,x\n")
    (tmp_path / "texts.csv").write_text("text\na;b\tc\n")

    assert read_examples(tmp_path / "data.csv", TEXT) == [Example("c;d", "x")]
    assert read_passages(tmp_path / "texts.csv", PASSAGES) == [Passage(None, "a;b\tc")]


# Two columns of one name


def two_in_csv(directory):
    (directory / "data.csv").write_text("text,label,label\na,x,y\n")
    return directory / "data.csv", "has two columns named 'label', expected one of a name"


def two_in_parquet(directory):
    columns = [pyarrow.array(["a"]), pyarrow.array(["x"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, ["text", "label", "text"])
    pyarrow.parquet.write_table(table, directory / "data.parquet")
    return directory / "data.parquet", "has two columns named 'text', expected one of a name"


def two_in_json(directory):
    file = write(directory / "data.jsonl", GOOD)
    file.write_text(file.read_text() + '\n{"text": "a", "label": "x", "label": "y"}')
    return file, "line 2 is not JSON (it has two values named 'label')"


@pytest.mark.parametrize("make", [two_in_csv, two_in_parquet, two_in_json])
def test_two_columns_of_one_name_are_refused(make, tmp_path):
    file, message = make(tmp_path)

    with pytest.raises(DataError) as caught:
        read_examples(file, TEXT)

    assert str(caught.value).startswith(f"{file}: {message}")


def test_columns_without_a_name_are_no_matter(tmp_path):
    (tmp_path / "data.csv").write_text("text,label,,\na,x,,\n")

    assert read_examples(tmp_path / "data.csv", TEXT) == [Example("a", "x")]


@pytest.mark.parametrize("context", ["ab\udcff", ["a", "b\ud800"], 5, [5]])
def test_a_context_that_is_no_text_is_refused(context):
    with pytest.raises(UsageError, match=r"context( \d)?: (holds half a character|is int)"):
        contexts_for("text-classification", context, 2)
