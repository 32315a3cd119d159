"""A path is read as a pattern: another directory's data are trained on, or a traceback is shown.

Every path that a user writes is used as it is written, except for `~`.
"""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from propulsion_export.adapters.provenance import absolute
from propulsion_export.adapters.specification import read_adapters
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.locking import exclusive_lock
from propulsion_export.artifacts.staging import staged_directory
from propulsion_export.cli import main
from propulsion_export.data.texts import read_texts
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import DataError, UsageError
from propulsion_export.serving.session import Session
from propulsion_export.training import train
from propulsion_export.training.data import Columns, Example, read_examples

TEXT = Columns("text-classification")
# Each beside a directory that it would name as a pattern, or with a variable expanded.
NAMES = [
    ("data[v2]", "datav"),
    ("data*", "data2"),
    ("dat?", "data"),
    ("$HOME", "home"),
    ("${HOME}", "home"),
    ("%41", "A"),
    ("~x", "x"),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(directory, label):
    directory.mkdir(parents=True)
    row = {"text": "a cat", "label": label}
    (directory / "train.jsonl").write_text(json.dumps(row) + "\n")


def save(directory, label):
    datasets.Dataset.from_dict({"text": ["a cat"], "label": [label]}).save_to_disk(directory)


@pytest.mark.parametrize("fill", [write_rows, save])
@pytest.mark.parametrize(("name", "sibling"), NAMES)
def test_a_directory_is_read_whatever_its_name_means_elsewhere(name, sibling, fill, tmp_path):
    fill(tmp_path / name, "own")
    fill(tmp_path / sibling, "sibling")

    for source in (tmp_path / name, user_path(name)):
        assert read_examples(source, TEXT) == [Example("a cat", "own")]


@pytest.mark.parametrize(("name", "sibling"), NAMES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_file_is_read_whatever_its_name_means_elsewhere(name, sibling, kind, tmp_path):
    for stem, label in ((name, "own"), (sibling, "sibling")):
        made = datasets.Dataset.from_dict({"text": ["a cat"], "label": [label]})
        write = made.to_json if kind == "jsonl" else getattr(made, f"to_{kind}")
        with (tmp_path / f"{stem}.{kind}").open("wb") as file:
            write(file)
    file = user_path(f"{name}.{kind}")

    assert read_examples(file, TEXT) == [Example("a cat", "own")]
    assert read_texts(file, "text-classification") == ["a cat"]


def test_a_saved_data_set_that_datasets_takes_for_an_address_is_refused(tmp_path):
    save(tmp_path / "a::b", "own")
    save(tmp_path / "b", "sibling")

    with pytest.raises(DataError, match=r"a::b: `datasets` cannot load it"):
        read_examples(Path("a::b"), TEXT)


@pytest.mark.parametrize("name", ["data[v2]", "$HOME"])
def test_a_missing_directory_is_not_another_one(name, tmp_path):
    write_rows(tmp_path / "datav", "sibling")
    write_rows(tmp_path / "home", "sibling")

    with pytest.raises(DataError, match="does not exist"):
        read_examples(Path(name), TEXT)


# Home directories


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert user_path("~/data") == user_path(Path("~/data")) == tmp_path / "data"
    assert user_path("~root/data") == Path("~root/data").expanduser() != Path("~root/data")
    assert user_path("data/~/x") == Path("data/~/x")


@pytest.mark.parametrize("name", ["./~", "./~nobody/x", "./~root"])
def test_a_path_from_here_is_no_home_directory(name, tmp_path):
    found = user_path(name)

    assert found == user_path(found) == tmp_path / name


def test_a_directory_with_the_name_of_no_user_is_found(tmp_path):
    (tmp_path / "~nobody-here").mkdir()

    assert user_path("~nobody-here") == tmp_path / "~nobody-here"


STRANGER = "~nobody-here/x"
WORDS = (
    f"{STRANGER}: this machine knows no home directory ~nobody-here, expected one, or a path such "
    f"as ./{STRANGER}"
)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(Artifact.read, id="artifact"),
        pytest.param(Session, id="session"),
        pytest.param(lambda path: read_adapters([path]), id="adapter"),
        pytest.param(lambda path: read_adapters([f"one={path}"]), id="named-adapter"),
        pytest.param(absolute, id="base"),
        pytest.param(lambda path: exclusive_lock(path).__enter__(), id="lock"),
        pytest.param(
            lambda path: staged_directory(Path(path), marker="m", force=False).__enter__(),
            id="output",
        ),
        pytest.param(lambda path: train("base", path, "out"), id="data"),
        pytest.param(lambda path: train("base", "data.jsonl", path), id="adapter-output"),
        pytest.param(lambda path: train(path, "data.jsonl", "out"), id="trained-base"),
    ],
)
def test_the_home_of_nobody_is_refused_in_a_line(call):
    with pytest.raises(UsageError) as caught:
        call(STRANGER)

    assert str(caught.value) == WORDS


GOOD = ["-m", "base", "-d", "data.jsonl", "-o", "out"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", *GOOD, "-d", STRANGER],
        ["train", *GOOD, "-o", STRANGER],
        ["train", *GOOD, "--validation", STRANGER],
        ["train", *GOOD, "-m", STRANGER],
        ["merge", "-a", STRANGER, "-o", "out"],
        ["merge", "-a", "one", "-o", STRANGER],
        ["onnx", "-a", f"one={STRANGER}", "-o", "out"],
        ["onnx", "-m", STRANGER, "-o", "out"],
        ["export", "-a", STRANGER, "-o", "out"],
        ["parity", STRANGER],
        ["parity", "onnx", "--inputs", STRANGER],
        ["parity", "onnx", "--report", STRANGER],
        ["parity", "onnx", "--junit", STRANGER],
        ["run", STRANGER, "--text", "a"],
        ["run", "onnx", "--inputs", STRANGER],
        ["trt", STRANGER, "-o", "out"],
        ["trt", "onnx", "-o", "out", "--timing-cache", STRANGER],
        ["package", "onnx", "-o", STRANGER],
        ["inspect", STRANGER],
        ["adapter", "list", STRANGER],
        ["adapter", "add", STRANGER, "one"],
    ],
    ids=lambda words: " ".join(words[:1] + [word for word in words if word.startswith("-")]),
)
def test_every_command_refuses_the_home_of_nobody_in_a_line(words, tmp_path, capsys):
    write_rows(tmp_path / "rows", "a")
    shutil.copyfile(tmp_path / "rows" / "train.jsonl", tmp_path / "data.jsonl")

    with pytest.raises(SystemExit) as done:
        main(words)

    assert done.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"propulsion-export: {WORDS}\n")
