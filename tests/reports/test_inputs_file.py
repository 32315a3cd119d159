"""`--inputs` reads a file otherwise than training does: JSON, or a byte-order mark, becomes text.

One reader serves both, by suffix, and names file and row of what is no text.
"""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from propulsion_export.data.texts import read_texts
from propulsion_export.errors import DataError, UnavailableError
from propulsion_export.training.data import Columns, read_examples

TASK = "text-classification"
TEXTS = ["a cat", "\u00e9t\u00e9 \u2028!", "NA"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, "xyx", strict=True)]
CUT_SHORT = gzip.compress(b"a text", mtime=0)[:-9]
MARK = "\ufeff"


def json_lines():
    return "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def csv_lines():
    return "label,text\r\n" + "".join(f"{row['label']},{row['text']}\r\n" for row in ROWS)


CONTENTS = {
    "texts.jsonl": json_lines(),
    "texts.JSONL": json_lines(),
    "texts.ndjson": json_lines(),
    "texts.Json": json_lines(),
    "texts.json": json.dumps(ROWS, indent=2),
    "texts.CSV": csv_lines(),
}


@pytest.mark.parametrize("mark", ["", MARK], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize("name", CONTENTS)
def test_the_texts_are_those_that_training_reads(name, mark, tmp_path):
    file = tmp_path / name
    file.write_bytes((mark + CONTENTS[name]).encode())

    assert read_texts(file, TASK) == TEXTS
    assert [example.text for example in read_examples(file, Columns(TASK))] == TEXTS


@pytest.mark.parametrize("name", ["texts.parquet", "texts.PARQUET"])
def test_texts_in_parquet_are_read(name, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)

    assert read_texts(tmp_path / name, TASK) == TEXTS


@pytest.mark.parametrize("name", ["texts.jsonl.gz", "texts.CSV.GZ"])
def test_gzipped_files_are_read_as_what_they_hold(name, tmp_path):
    content = json_lines() if "jsonl" in name else csv_lines()
    (tmp_path / name).write_bytes(gzip.compress((MARK + content).encode()))

    assert read_texts(tmp_path / name, TASK) == TEXTS


@pytest.mark.parametrize("name", ["texts.txt", "texts.TXT", "texts"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_file_has_a_text_on_each_line(name, end, tmp_path):
    lines = [TEXTS[0], "", TEXTS[1], " ", '{"text": "no JSON here"}', ""]
    (tmp_path / name).write_bytes((MARK + end.join(lines)).encode())

    assert read_texts(tmp_path / name, TASK) == [TEXTS[0], TEXTS[1], '{"text": "no JSON here"}']


# Columns


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("text-classification", {"text": "a", "label": "x"}, "a"),
        ("question-answering", {"text": "who?"}, "who?"),
        ("text-generation", {"prompt": "a", "response": "b"}, "a"),
        ("text2text-generation", {"prompt": "a"}, "a"),
        ("text-generation", {"text": "a"}, "a"),
        ("token-classification", {"text": "a cat"}, "a cat"),
        ("token-classification", {"text": ["a", "cat"]}, ["a", "cat"]),
        ("token-classification", {"tokens": ["a", "cat"], "labels": ["x", "y"]}, ["a", "cat"]),
    ],
)
def test_the_column_is_text_or_the_one_that_the_task_trains_on(task, row, expected, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps(row))

    assert read_texts(tmp_path / "texts.jsonl", task) == [expected]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("text-generation", {"a": 1, "b": 2}, "has no column 'text' or 'prompt', found 'a', 'b'."),
        ("fill-mask", {"prompt": "a"}, "has no column 'text', found 'prompt'."),
        (
            "token-classification",
            {"text": "a cat", "tokens": ["a", "cat"]},
            "has the columns 'text' and 'tokens', expected one of them.",
        ),
    ],
)
def test_a_file_without_one_such_column_is_refused(task, row, message, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps(row))

    with pytest.raises(DataError) as caught:
        read_texts(tmp_path / "texts.jsonl", task)

    assert str(caught.value).startswith(f"{tmp_path / 'texts.jsonl'}: {message}")


# What is no text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": 5}', "line 3: text is 5, expected a string"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', "line 2: text is null, expected a string"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', "line 2: text is null, expected a string"),
        ("a.ndjson", '{"text": " "}', "line 1: text is empty, expected a text"),
        ("a.JSONL", '{"text": "\\ud83d"}', "line 1: text holds half a character"),
        ("a.jsonl", '{"text": "a"}\nplain', "line 2 is not JSON"),
        ("a.json", '[{"text": "a"}, "b"]', "item 2 holds a str, expected a JSON object"),
        ("a.json", '[{"text": "a"}', "the file is not JSON"),
        ("a.csv", "text\n\n   \n", "row 1: text is empty, expected a text"),
        ("a.txt", "\n \n", "is empty, expected at least one text"),
        ("a.tsv", "text\n", "has the suffix '.tsv', expected one of .jsonl, .ndjson, .json, .csv"),
        ("a.txt", b"a\n\xffb", "byte 2 is not UTF-8 text"),
        ("a.txt.gz", b"a text", "cannot be read (Not a gzipped file"),
        ("a.txt.gz", CUT_SHORT, "cannot be read (Compressed file ended"),
        ("b/a.jsonl", None, "does not exist"),
    ],
)
def test_what_is_no_text_is_refused_with_file_and_row(name, content, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(DataError) as caught:
        read_texts(file, TASK)

    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_the_inputs_of_parity_are_read_alike(tiny_checkpoint, tmp_path):
    from propulsion_export.base_model.loading import load_base
    from propulsion_export.parity.inputs import make_batches

    base = load_base(str(tiny_checkpoint("bert", TASK)), task=TASK)
    texts = [f"ba {word}" for word in ("be", "bi", "ko", "do") for _ in range(4)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "a.JSONL").write_text(MARK + lines)

    plain, marked = (
        make_batches(base, tmp_path / name, 0, short=False) for name in ("a.txt", "a.JSONL")
    )

    assert len(plain) == len(marked) == 4
    for ours, theirs in zip(plain, marked, strict=True):
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours)


# Where only serving is installed


def test_reading_texts_loads_no_framework(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines())
    script = (
        "import sys; from pathlib import Path; from propulsion_export.data.texts import read_texts;"
        f"read_texts(Path({str(tmp_path / 'a.jsonl')!r}), {TASK!r});"
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_parquet_without_pyarrow_is_refused_with_the_command_to_install_it(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(UnavailableError, match=r"only pyarrow reads Parquet.* pip install pyarrow"):
        read_texts(tmp_path / "a.parquet", TASK)
