"""Bad data is one clear line; good data comes out as it stands in the file."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.errors import DataError
from propulsion_export.training.data import (
    Columns,
    Example,
    check_labels_known,
    classes_of,
    hold_out,
    read_examples,
)

TEXT = Columns("text-classification")
WORDS = Columns("token-classification")
GOOD = '{"text": "a cat", "label": "animal"}\n'
EXAMPLES = [Example("a, b\u2028c", "x"), Example("d", "2"), Example("e\u2028f", "x")]


def write_jsonl(directory):
    rows = [{"text": example.text, "label": example.label} for example in EXAMPLES]
    rows[1]["label"] = 2
    file = directory / "data.jsonl"
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text(lines, encoding="utf-8")
    return file


def write_csv(directory):
    file = directory / "data.csv"
    file.write_text('\ufefflabel,text\nx,"a, b\u2028c"\n2,d\nx,e\u2028f\n', encoding="utf-8")
    return file


def write_parquet(directory):
    file = directory / "data.parquet"
    columns = {"text": ["a, b\u2028c", "d", "e\u2028f"], "label": ["x", "2", "x"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def write_datasets(directory):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "2"])}
    )
    columns = {"text": ["a, b\u2028c", "d", "e\u2028f"], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(directory / "data")
    return directory / "data"


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet, write_datasets])
def test_every_kind_of_file_gives_the_same_examples(write, tmp_path):
    assert read_examples(write(tmp_path), TEXT) == EXAMPLES


def test_only_the_split_for_training_of_a_directory_is_read(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "train.jsonl").write_text(GOOD, encoding="utf-8")
    (directory / "test.jsonl").write_text(GOOD.replace("cat", "dog"), encoding="utf-8")

    assert read_examples(directory, TEXT) == [Example("a cat", "animal")]


def test_words_and_their_labels_are_read(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"tokens": ["a", "cat"], "labels": [0, "animal"]}', encoding="utf-8")

    assert read_examples(file, WORDS) == [Example(["a", "cat"], ["0", "animal"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "data.jsonl: holds no rows, expected at least one", id="empty"),
        pytest.param(GOOD + "{oops\n", "data.jsonl: line 2 is not JSON (", id="not-json"),
        pytest.param(GOOD + "[1]\n", "line 2 holds a list, expected a JSON object", id="no-object"),
        pytest.param(
            '{"sentence": "a", "kind": "b"}\n',
            "has no column 'text', found 'sentence', 'kind'; {path}: has no column 'label', found "
            "'sentence', 'kind'. Name the column with --text-column and --label-column.",
            id="no-columns",
        ),
        pytest.param(
            '{"text": "a", "class": "b"}\n',
            "has no column 'label', found 'text', 'class'. Name the column with --label-column.",
            id="no-label-column",
        ),
        pytest.param(
            '{"messages": []}\n',
            "has no column 'label', found 'messages'. Train on conversations with --task "
            "text-generation.",
            id="conversations",
        ),
        pytest.param(
            GOOD + '\n{"text": 5, "label": "b"}\n',
            "data.jsonl: line 3: text is 5, expected a string. Correct or remove these rows.",
            id="text-is-a-number",
        ),
        pytest.param(
            GOOD + '{"label": "b"}\n', "line 2: text is null, expected a string", id="no-text"
        ),
        pytest.param(
            GOOD + '{"text": " ", "label": "b"}\n',
            "line 2: text is empty, expected a text",
            id="empty-text",
        ),
        pytest.param(
            GOOD + '{"text": "a", "label": null}\n',
            "line 2: label is null, expected a class name",
            id="null-label",
        ),
        pytest.param(
            GOOD + '{"text": "a", "label": 0.5}\n',
            "line 2: label is 0.5, expected a class name",
            id="label-is-a-fraction",
        ),
    ],
)
def test_bad_rows_of_text_classification_are_named(content, message, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(content, encoding="utf-8")

    with pytest.raises(DataError) as caught:
        read_examples(file, TEXT)

    assert message.format(path=file) in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "a cat", "labels": ["x"]}, "tokens is 'a cat', expected a list of words"),
        ({"tokens": [], "labels": []}, "tokens is [], expected a list of words"),
        ({"tokens": ["a"], "labels": "x"}, "labels is 'x', expected a list of class names"),
        (
            {"tokens": ["a", "b"], "labels": ["x"]},
            "has 2 tokens and 1 labels, expected one label per word",
        ),
        ({"tokens": ["a", ""], "labels": ["x", "y"]}, "tokens[1] is '', expected a word"),
        ({"tokens": ["a", 3], "labels": ["x", "y"]}, "tokens[1] is 3, expected a word"),
        (
            {"tokens": ["a", "b"], "labels": ["x", None]},
            "labels[1] is null, expected a class name",
        ),
    ],
)
def test_bad_rows_of_token_classification_are_named(row, message, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")

    with pytest.raises(DataError) as caught:
        read_examples(file, WORDS)

    assert f"{file}: line 1: {message}" in str(caught.value)


def test_every_bad_row_is_counted(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(GOOD + '{"text": "", "label": ""}\n' * 9, encoding="utf-8")

    with pytest.raises(DataError, match="and 5 more") as caught:
        read_examples(file, TEXT)

    assert len(caught.value.findings) == 9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.tsv", b"a", "has the suffix '.tsv', expected one of .jsonl, .ndjson, .json, .csv, "),
        ("data.txt", b"a", "has no column 'label', found 'text'"),
        ("data.csv", b"text,label\na,b,c\n", "row 1 has more fields than the header, expected 2"),
        ("data.csv", b"text,label\na\n", "row 1: label is null, expected a class name"),
        ("data.csv", b'text,label\n"a"b,c\n', "is not CSV"),
        ("data.csv", b"text,label\n\xff,b\n", "byte 11 is not UTF-8 text"),
        ("data.parquet", b"PAR1 no", "is no readable Parquet file"),
        ("data", None, "does not exist, expected a file or directory with data"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(DataError) as caught:
        read_examples(file, TEXT)

    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no data files, expected JSONL, CSV, Parquet or"):
        read_examples(tmp_path, TEXT)


def test_a_name_on_a_hub_is_handed_to_datasets(tmp_path, monkeypatch):
    loaded = {"train": datasets.load_from_disk(str(write_datasets(tmp_path)))}
    loaded_names = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: SimpleNamespace(config=None))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded_names.append(name) or loaded)
    monkeypatch.chdir(tmp_path)

    assert read_examples(Path("owner/name"), TEXT) == EXAMPLES
    assert loaded_names == ["owner/name"]


def test_a_hub_that_is_not_reached_is_one_line(tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DataError) as caught:
        read_examples(Path("owner/name"), TEXT)

    assert str(caught.value) == (
        "owner/name: is no local file or directory, and `datasets` cannot load it from a hub "
        "(Couldn't reach it)"
    )


@pytest.mark.parametrize(
    "name", ["here/name", "owner/train.jsonl", "a/b/c", "name", "../name", "/name", "~/name"]
)
def test_no_hub_is_asked_for_what_reads_like_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", None)

    with pytest.raises(DataError, match=f"^{name}: does not exist, expected a file or directory"):
        read_examples(Path(name), TEXT)


def test_classes_are_sorted_as_numbers_only_where_all_are_numbers(tmp_path):
    numbers = [Example("a", "10"), Example("b", "9"), Example("c", "-1")]
    mixed = [*numbers, Example("d", "x")]

    assert classes_of(tmp_path, numbers) == ["-1", "9", "10"]
    assert classes_of(tmp_path, mixed) == ["-1", "10", "9", "x"]


def test_a_single_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="every row has the label 'x', expected two classes"):
        classes_of(tmp_path, [Example("a", "x"), Example(["b"], ["x"])])


def test_labels_that_training_never_saw_are_all_named(tmp_path):
    examples = [Example("a", "z"), Example("b", "x"), Example("c", "y")]

    with pytest.raises(DataError, match="the labels 'y', 'z' do not occur in the training data"):
        check_labels_known(tmp_path, examples, ["w", "x"])


def split(source, examples, seed):
    return hold_out(source, examples, seed, stratum=lambda example: example.stratum)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.sampled_from("xyz"), min_size=2), st.integers(0, 5))
def test_held_out_rows_are_a_tenth_of_each_class_and_the_rest_stays(tmp_path_factory, labels, seed):
    examples = [Example(f"text {index}", label) for index, label in enumerate(labels)]
    if all(labels.count(label) == 1 for label in labels):
        with pytest.raises(DataError, match="too few to hold some out"):
            split(tmp_path_factory.getbasetemp(), examples, seed)
        return

    training, validation = split(tmp_path_factory.getbasetemp(), examples, seed)

    assert sorted(training + validation, key=examples.index) == examples
    for label in set(labels):
        held_out = sum(example.label == label for example in validation)
        count = labels.count(label)
        assert held_out == (0 if count == 1 else max(1, round(count / 10)))


def test_another_seed_holds_out_other_rows(tmp_path):
    examples = [Example(f"text {index}", "xy"[index % 2]) for index in range(60)]

    assert split(tmp_path, examples, 0) == split(tmp_path, examples, 0)
    assert split(tmp_path, examples, 0) != split(tmp_path, examples, 1)
