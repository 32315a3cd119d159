"""A directory gives the rows of its files: which ones, and what its README.md says of them."""

import gzip
import json

import pytest

from propulsion_export.data.sources import read_rows
from propulsion_export.errors import DataError

CARD = "---\n{}\n---\n# A data set\n"


@pytest.fixture
def fill(tmp_path):
    """`fill(name, …)`: write files that each hold a row with their own name."""

    def make(*names):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(("csv", "csv.gz")):
                content = f"text\n{name}\n".encode()
            else:
                content = (json.dumps({"text": name}) if ".json" in name.lower() else name).encode()
            file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return tmp_path

    return make


def texts(directory):
    return [row["text"] for _, row in read_rows(directory)]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["b.csv", "a.csv"], ["a.csv", "b.csv"]),
        (["b.JSONL", "a/b.jsonl"], ["a/b.jsonl", "b.JSONL"]),
        (["train.csv", "test.csv", "other.csv"], ["train.csv"]),
        (["Training-set.csv", "dev_2.csv"], ["Training-set.csv"]),
        (
            [
                "data/train-00001-of-00002.jsonl",
                "data/train-00000-of-00002.jsonl",
                "data/eval.jsonl",
            ],
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ),
        (["train/test.csv", "test/train.csv"], ["train/test.csv"]),
        (["trains.csv", "contest.csv"], ["contest.csv", "trains.csv"]),
        (["a.csv", "LICENSE.txt", "notes.md", ".b.csv", ".cache/c.csv"], ["a.csv"]),
        (["a.txt", "b.txt"], ["a.txt", "b.txt"]),
        (["a.jsonl.gz", "b.jsonl"], ["a.jsonl.gz", "b.jsonl"]),
        (["a.csv", "dataset_infos.json"], ["a.csv"]),
    ],
)
def test_the_files_to_train_on_are_read_in_order(names, read, fill):
    assert texts(fill(*names)) == read


def test_links_to_folders_are_followed_once(fill, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "a.csv").write_text("text\nfar\n")
    directory = fill("b.csv")
    (directory / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(directory)

    assert texts(directory) == ["b.csv", "far"]


def test_a_row_is_named_with_its_file(fill):
    directory = fill("a/one.csv", "two.csv")

    assert [where for where, _ in read_rows(directory)] == ["a/one.csv, row 1", "two.csv, row 1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.md"], "holds no data files, expected JSONL, CSV, Parquet or text files"),
        (["test.csv", "valid.csv"], "has the splits test, validation, expected 'train'"),
        (["a.csv", "b.jsonl"], "holds .csv and .jsonl files, expected one kind"),
    ],
)
def test_other_directories_are_refused(names, message, fill):
    directory = fill(*names)

    with pytest.raises(DataError) as caught:
        read_rows(directory)

    assert str(caught.value).startswith(f"{directory}: {message}")


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ("license: mit", ["a.csv", "b/c.csv"]),
        ("configs:\n- config_name: one\n  data_files: b/*.csv", ["b/c.csv"]),
        ("configs:\n- data_files: [a.csv, b/*]", ["a.csv", "b/c.csv"]),
        ("configs:\n- data_files:\n  - split: train\n    path: a.csv", ["a.csv"]),
        ("configs:\n- data_files:\n  - {split: train, path: [b/c.csv]}", ["b/c.csv"]),
        ("configs:\n- data_dir: b", ["b/c.csv"]),
        (
            "configs:\n- {config_name: one, data_files: a.csv}\n"
            "- {config_name: two, data_files: b/c.csv, default: true}",
            ["b/c.csv"],
        ),
    ],
)
def test_a_card_names_the_files(settings, read, fill):
    directory = fill("a.csv", "b/c.csv")
    (directory / "README.md").write_text(CARD.format(settings))

    assert texts(directory) == read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "configs:\n- {config_name: one, data_files: a.csv}\n- {config_name: two}",
            "README.md: has the configurations one, two, expected one or a default",
        ),
        ("configs:\n- data_files: z*.csv", "README.md: names as files of 'train' 'z*.csv', exp"),
        ("configs:\n- data_files:\n  - {split: test, path: a.csv}", "files of 'train' none"),
        ("configs:\n- data_files: ../x.csv", "names as files of 'train' '../x.csv', expected"),
        ("configs:\n- data_files: /x.csv", "names as files of 'train' '/x.csv', expected"),
        ("configs: {a: [", "README.md: its head cannot be read"),
        ("configs: text", "README.md: its configs are 'text', expected a list of settings"),
        ("dataset_info: {features: [{name: a, dtype: {class_label: {names: {'1': b}}}}]}",
         "README.md: its dataset_info cannot be read"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_followed_is_refused(settings, message, fill):
    directory = fill("a.csv", "b/c.csv")
    (directory / "README.md").write_text(CARD.format(settings))

    with pytest.raises(DataError) as caught:
        read_rows(directory)

    assert message in str(caught.value)
