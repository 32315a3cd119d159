"""An artifact from a hub consists of links into the hub's cache, and every command refused it.

A pointer that git-lfs left in the place of a file was called a damaged file.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter, compact_bank, remove_adapter
from propulsion_export.base_model.loading import load_base
from propulsion_export.data.sources import read_rows
from propulsion_export.data.texts import read_texts
from propulsion_export.errors import (
    AdapterError,
    ArtifactError,
    BaseModelError,
    DataError,
    PropulsionExportError,
    UsageError,
)
from propulsion_export.graph import files
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.serving.session import Session
from propulsion_export.training import TrainOptions
from propulsion_export.training.trainer import train

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456\n"


@pytest.fixture
def cached(tmp_path):
    """`cached(directory)`: it as huggingface_hub keeps a download: links to blobs."""

    def make(directory, kind="models"):
        repository = tmp_path / "hub" / f"{kind}--acme--{directory.name}"
        snapshot = repository / "snapshots" / "0123abc"
        (repository / "blobs").mkdir(parents=True)
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            place = file.relative_to(directory)
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / place).parent.mkdir(parents=True, exist_ok=True)
            up = "../" * (len(place.parts) + 1)
            (snapshot / place).symlink_to(f"{up}blobs/{blob.name}")
        return snapshot

    return make


def test_an_export_in_a_hubs_cache_is_read_run_and_judged(cached, switchable, world):
    snapshot = cached(switchable)

    replies = Session(snapshot)(["ba be"], "five")

    np.testing.assert_array_equal(
        replies[0].outputs["logits"], Session(switchable)(["ba be"], "five")[0].outputs["logits"]
    )
    assert check_parity(snapshot).passed


def test_weights_outside_the_graph_are_found_behind_their_link(
    cached, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "_INLINE_BYTES", 64)
    export_onnx([world.three], tmp_path / "large")
    assert (tmp_path / "large" / "model.onnx.data").is_file()

    assert check_parity(cached(tmp_path / "large")).passed


def test_a_merged_checkpoint_in_a_hubs_cache_is_a_base_model(cached, world, tmp_path):
    merge(world.three, tmp_path / "merged")
    snapshot = cached(tmp_path / "merged")

    assert Artifact.read(snapshot).manifest.kind == "merged"
    assert load_base(str(snapshot), task="text-classification").own_head
    with pytest.raises(BaseModelError, match="holds the adapter three already"):
        merge(world.three, tmp_path / "out", model=str(snapshot))


def test_an_adapter_in_a_hubs_cache_is_read(cached, world):
    assert Adapter.read(cached(world.three)).digest == Adapter.read(world.three).digest


@pytest.mark.parametrize("target", ["another repository", "a file of the user", "the cache"])
def test_a_link_out_of_its_repository_is_refused(target, cached, switchable, tmp_path):
    snapshot = cached(switchable)
    places = {
        "another repository": tmp_path / "hub" / "models--acme--other" / "blobs" / "file",
        "a file of the user": tmp_path / "file",
        "the cache": snapshot.parents[1] / "refs" / "main",
    }
    place = places[target]
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(switchable / "config.json", place)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(place)

    with pytest.raises(ArtifactError, match=r"the path 'config\.json' leads out of the directory"):
        Artifact.read(snapshot)


def test_links_elsewhere_are_refused_as_before(cached, switchable, tmp_path):
    shutil.copytree(cached(switchable).parents[1], tmp_path / "plain", symlinks=True)

    with pytest.raises(ArtifactError, match="leads out of the directory"):
        Artifact.read(tmp_path / "plain" / "snapshots" / "0123abc")


@pytest.mark.parametrize("change", ["add", "remove", "compact", "force"])
def test_what_changes_files_is_refused_in_a_hubs_cache(change, cached, switchable, banked, world):
    snapshot = cached(banked if change == "compact" else switchable)
    before = {path.name: path.read_bytes() for path in (snapshot.parents[1] / "blobs").iterdir()}
    changes = {
        "add": lambda: add_adapter(snapshot, f"new={world.three}"),
        "remove": lambda: remove_adapter(snapshot, "three"),
        "compact": lambda: compact_bank(snapshot),
        "force": lambda: export_onnx([world.three], snapshot, force=True),
    }

    with pytest.raises((ArtifactError, UsageError), match="lies in a hub's cache") as caught:
        changes[change]()

    assert caught.value.exit_code in (2, 4)
    after = {path.name: path.read_bytes() for path in (snapshot.parents[1] / "blobs").iterdir()}
    assert after == before


def test_a_bank_in_a_hubs_cache_serves(cached, banked):
    session = Session(cached(banked))

    right = Session(banked)(["ba be", "bi"], ["three", "five"])
    for found, expected in zip(session(["ba be", "bi"], ["three", "five"]), right, strict=True):
        np.testing.assert_array_equal(found.outputs["logits"], expected.outputs["logits"])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "spm.model"]
)
@pytest.mark.parametrize("command", ["merge", "onnx", "train"])
def test_a_pointer_in_a_base_model_is_called_one(name, command, world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    (base / name).write_text(POINTER)

    with pytest.raises(BaseModelError) as caught:
        _run(command, base, world, tmp_path)

    _says_pointer(caught.value, base / name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_pointer_in_an_adapter_is_called_one(name, world, tmp_path):
    shutil.copytree(world.three, tmp_path / "three")
    (tmp_path / "three" / name).write_text(POINTER)

    with pytest.raises(AdapterError) as caught:
        Adapter.read(tmp_path / "three")

    _says_pointer(caught.value, tmp_path / "three" / name)


@pytest.mark.parametrize(
    "name", ["model.onnx", "tokenizer.json", "adapters/three.safetensors", "propulsion.json"]
)
def test_a_pointer_in_an_artifact_is_called_one(name, switchable, tmp_path):
    shutil.copytree(switchable, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(POINTER)

    with pytest.raises(ArtifactError) as caught:
        Session(tmp_path / "copy")

    _says_pointer(caught.value, tmp_path / "copy" / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "folder/a.parquet"])
def test_a_pointer_in_the_place_of_data_is_called_one(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(POINTER)

    with pytest.raises(DataError) as caught:
        read_rows(file.parent if "/" in name else file)

    _says_pointer(caught.value, file)


@pytest.mark.parametrize("name", ["texts.txt", "texts", "texts.CSV"])
def test_texts_to_run_are_no_pointer(name, tmp_path):
    (tmp_path / name).write_text(POINTER)

    with pytest.raises(DataError) as caught:
        read_texts(tmp_path / name, "text-classification")

    _says_pointer(caught.value, tmp_path / name)


@pytest.mark.parametrize("name", ["bank.bin", "registry.sqlite"])
def test_the_files_of_a_bank_are_no_pointers(name, banked, tmp_path):
    directory = shutil.copytree(banked, tmp_path / "bank")
    (directory / "adapters" / name).write_text(POINTER)

    with pytest.raises(ArtifactError) as caught:
        Artifact.read(directory)

    _says_pointer(caught.value, directory / "adapters" / name)


def test_a_pointer_that_is_not_needed_does_no_harm(world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    for name in ("pytorch_model.bin", "picture.png"):
        (base / name).write_text(POINTER)

    assert merge(world.three, tmp_path / "out", model=str(base)).manifest.kind == "merged"


def _says_pointer(error: PropulsionExportError, file):
    assert str(error) == (
        f"{file}: is a git-lfs pointer, expected the file itself. "
        "Run `git lfs pull` in its repository."
    )
    assert error.exit_code == 4


def _run(command, base, world, tmp_path):
    if command == "merge":
        merge(world.three, tmp_path / "out", model=str(base))
    elif command == "onnx":
        export_onnx([world.three], tmp_path / "out", model=str(base))
    else:
        data = tmp_path / "rows.jsonl"
        rows = ({"text": "ba", "label": label} for label in ("a", "b") * 3)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train(base, data, tmp_path / "out", options=TrainOptions(epochs=1))
