"""Labels that are read otherwise than they stand in the data train another adapter, unnoticed.

A file and its directory, a saved data set, CSV, JSONL and Parquet: the same rows give the same
examples, and what is no label is refused with its row.
"""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from propulsion_export.errors import DataError
from propulsion_export.training.data import Columns, Example, classes_of, read_examples

TEXT = Columns("text-classification")
WORDS = Columns("token-classification")
LABEL = datasets.ClassLabel(names=["ham", "spam"])
TEXTS = ["a cat", "a dog", "a cow"]


def save(directory, label, values, texts=TEXTS):
    """A data set as `save_to_disk` writes it, with the feature `label`."""
    column, inputs = ("label", "text") if isinstance(texts[0], str) else ("labels", "tokens")
    text = datasets.Value("string")
    features = datasets.Features(
        {inputs: text if column == "label" else datasets.List(text), column: label}
    )
    made = datasets.Dataset.from_dict({inputs: texts, column: values}, features)
    made.save_to_disk(directory)
    return made


def as_saved(directory, label, values, texts=TEXTS):
    save(directory / "saved", label, values, texts)
    return directory / "saved"


def as_parquet(directory, label, values, texts=TEXTS):
    save(directory / "saved", label, values, texts).to_parquet(directory / "data.parquet")
    return directory / "data.parquet"


def as_directory(directory, label, values, texts=TEXTS):
    (directory / "data").mkdir()
    file = directory / "data" / "train-00000-of-00001.parquet"
    save(directory / "saved", label, values, texts).to_parquet(file)
    return directory / "data"


WRITERS = [as_saved, as_parquet, as_directory]


# Class numbers and their names


@pytest.mark.parametrize("write", WRITERS)
def test_class_numbers_get_their_names_wherever_they_are_written(write, tmp_path):
    source = write(tmp_path, LABEL, [0, 1, 0])

    assert [example.label for example in read_examples(source, TEXT)] == ["ham", "spam", "ham"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "kind",
    [datasets.List, datasets.LargeList, lambda inner: datasets.List(inner, length=2)],
    ids=["list", "large-list", "fixed-list"],
)
def test_class_numbers_in_lists_get_their_names(write, kind, tmp_path):
    source = write(tmp_path, kind(LABEL), [[0, 1], [1, 1]], [["a", "cat"], ["b", "dog"]])

    assert read_examples(source, WORDS) == [
        Example(["a", "cat"], ["ham", "spam"]),
        Example(["b", "dog"], ["spam", "spam"]),
    ]


def test_names_in_the_form_of_older_versions_are_found(tmp_path):
    features = {"labels": [{"names": ["O", "B"], "_type": "ClassLabel"}]}
    table = pyarrow.table({"tokens": [["a", "b"]], "labels": [[1, 0]]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")

    assert read_examples(tmp_path / "a.parquet", WORDS) == [Example(["a", "b"], ["B", "O"])]


@pytest.mark.parametrize("write", WRITERS)
def test_a_row_without_a_label_is_refused_by_name(write, tmp_path):
    source = write(tmp_path, LABEL, [0, -1, 1])

    with pytest.raises(DataError) as caught:
        read_examples(source, TEXT)

    assert str(caught.value).startswith(str(source))
    assert (
        "row 2: label is class number -1, which says that the row has no label, expected 0 to 1."
    ) in str(caught.value)


@pytest.mark.parametrize("number", [-2, 2, 7])
def test_a_class_number_without_a_name_is_refused_by_name(number, tmp_path):
    table = save(tmp_path / "saved", LABEL, [0, 1, 1]).data.table
    numbers = pyarrow.array([0, number, 1], pyarrow.int64())
    table = table.set_column(1, pyarrow.field("label", pyarrow.int64()), numbers)
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")

    with pytest.raises(DataError, match=f"row 2: label is class number {number}, expected 0 to 1"):
        read_examples(tmp_path / "data.parquet", TEXT)


def test_a_word_without_a_label_is_refused_by_name(tmp_path):
    source = as_saved(tmp_path, datasets.List(LABEL), [[0, -1]], [["a", "cat"]])

    with pytest.raises(DataError, match=r"row 1: labels\[1\] is class number -1, which says"):
        read_examples(source, WORDS)


def test_another_column_may_lack_labels(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": LABEL, "topic": LABEL})
    columns = {"text": TEXTS, "label": [0, 1, 0], "topic": [-1, -1, 0]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "saved")

    assert len(read_examples(tmp_path / "saved", TEXT)) == 3


def test_a_negative_number_that_no_name_belongs_to_is_a_class(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, [-1, 0, 1], strict=True)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    assert classes_of(file, read_examples(file, TEXT)) == ["-1", "0", "1"]


def test_a_card_names_the_classes_of_its_files(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n"
        "    dtype:\n      class_label:\n        names:\n          '0': ham\n"
        "          '1': spam\n"
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: mails/first*.csv\n  - split: test\n    path: mails/second.csv\n---\n# Mails\n"
    )
    (tmp_path / "mails").mkdir()
    (tmp_path / "mails" / "first-1.csv").write_text("text,label\na,0\nb,spam\n")
    (tmp_path / "mails" / "second.csv").write_text("text,label\nc,0\n")

    assert read_examples(tmp_path, TEXT) == [Example("a", "ham"), Example("b", "spam")]


# One rule for a file and for the directory that it is in


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.csv", "text,label\nNA,01\nnull,1e3\nb,NA\n"),
        ("data.csv", 'text,label\n"1,5 ",True\n 2021-01-01,False\n'),
        ("data.jsonl", '{"text": "2021-01-01 00:00:00", "label": true}\n{"text": "b", "label": 1}'),
        ("data.ndjson", '{"text": "01", "label": "01"}\n{"text": "b", "label": 7}\n'),
    ],
)
def test_a_directory_is_read_as_its_file_is(name, content, tmp_path):
    file = tmp_path / name
    file.write_text(content)

    assert read_examples(tmp_path, TEXT) == read_examples(file, TEXT)


def test_the_cells_of_a_csv_file_are_texts_as_they_stand(tmp_path):
    (tmp_path / "data.csv").write_bytes(b'text,label\r\nNA,01\r\n"a\r\nb ",NA\r\n')

    assert read_examples(tmp_path, TEXT) == [Example("NA", "01"), Example("a\r\nb ", "NA")]


def test_the_same_rows_give_the_same_examples_in_every_form(tmp_path):
    rows = [("a\u2028 cat", "01"), ("NA", "x y"), ("null", "NA")]
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    made = datasets.Dataset.from_dict(columns)
    made.save_to_disk(tmp_path / "saved")
    for name in ("csv", "json", "parquet"):
        (tmp_path / name).mkdir()
        getattr(made, f"to_{name}")(tmp_path / name / f"train.{name}")

    sources = [
        tmp_path / "saved",
        *(tmp_path / name / file for name in ("csv", "json", "parquet")
          for file in ("", f"train.{name}")),
    ]  # fmt: skip

    expected = [Example(*row) for row in rows]
    assert [read_examples(source, TEXT) for source in sources] == [expected] * 7


# Labels that a reader takes for one


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "a "),
        ("a", "\u00a0a"),
        ("caf\u00e9", "cafe\u0301"),
        ("true", "True"),
        (True, "TRUE"),
        (False, "False"),
        ("1", "01"),
        (1, "1 "),
    ],
)
@pytest.mark.parametrize("form", ["text", "words"])
def test_labels_that_differ_only_in_writing_are_refused_with_their_rows(
    form, first, second, tmp_path
):
    labels = ["x", first, first, second]
    rows = [{"text": "a", "label": label} for label in labels]
    if form == "words":
        rows = [{"tokens": ["a", "b"], "labels": ["x", label]} for label in labels]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    with pytest.raises(DataError) as caught:
        read_examples(file, TEXT if form == "text" else WORDS)

    name = str(first).lower() if isinstance(first, bool) else str(first)
    assert str(caught.value) == (
        f"{file}: the labels {name!r} (line 2) and {second!r} (line 4) differ only in how they "
        "are written. Write each class in one way."
    )


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["Us", "us"], ["Us", "us"]),  # a word in another case is another word
        ([True, "true", False], ["false", "true"]),
        ([1, "1", "10", "2"], ["1", "2", "10"]),
        (["a ", "b "], ["a ", "b "]),
    ],
)
def test_labels_that_differ_for_a_reader_are_as_many_classes(labels, classes, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in labels))

    assert classes_of(file, read_examples(file, TEXT)) == classes


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([["neg", "pos"], [1, 0]], r"b\.jsonl has class numbers and a\.jsonl class names"),
        ([[3, 4], ["three", "four"]], r"a\.jsonl has class numbers and b\.jsonl class names"),
    ],
)
def test_files_of_which_only_some_name_their_classes_are_refused(labels, found, tmp_path):
    for name, own in zip("ab", labels, strict=True):
        lines = (json.dumps({"text": f"{name} {one}", "label": one}) for one in own)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    with pytest.raises(DataError, match=found):
        read_examples(tmp_path, Columns("text-classification"))
