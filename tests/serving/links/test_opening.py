"""A session reads the directory that its link led to when it was opened."""

import json
import shutil

import numpy as np
import pytest
from releases import TEXT, asked, both

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import read_manifest
from propulsion_export.errors import ArtifactError, UnavailableError, UnknownAdapterError
from propulsion_export.serving import session as session_module
from propulsion_export.serving import texts as texts_module
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session


@both
def test_the_releases_can_be_told_apart(kind, releases):
    """Else no test here could fail."""
    of = releases(kind)
    first, second, other = (asked(Session(r)) for r in (of.first, of.second, of.other))

    assert first[0] == other[0] != second[0]
    assert len({json.dumps(answer[2]) for answer in (first, second, other)}) == 3


def repoint(of):
    of.point(of.other)


def delete(of):
    shutil.rmtree(of.first)


def replace_in_place(of):
    of.put_in_place_of_first(of.other)


@both
@pytest.mark.parametrize("happens", [repoint, delete, replace_in_place])
def test_the_first_text_is_read_by_what_was_opened_whatever_happens_to_the_path(
    kind, happens, releases
):
    of = releases(kind)
    session, right = Session(of.link), asked(Session(of.first))

    happens(of)

    assert asked(session) == right
    with pytest.raises(UnknownAdapterError, match="has no adapter 'new'"):
        session(TEXT, "new")


def test_generating_needs_nothing_of_a_directory_that_is_gone(exported, tmp_path):
    directory = shutil.copytree(exported("llama", "switchable"), tmp_path / "llama")
    settings = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(settings | {"num_beams": 4}))
    Artifact.write(directory, read_manifest(directory / MANIFEST_FILE))
    short = Settings(new_tokens=4)
    right = Session(directory)("ba be", "one", settings=short)[0].prediction
    session = Session(directory)

    shutil.rmtree(directory)

    assert session("ba be", "one", settings=short)[0].prediction == right
    assert session.settings_not_applied == {"num_beams": 4}


def test_a_merged_checkpoint_needs_nothing_of_a_directory_that_is_gone(world, tmp_path):
    from propulsion_export.pipeline.merge import merge

    merge(world.three, tmp_path / "merged")
    right = asked(Session(tmp_path / "merged"))
    session = Session(tmp_path / "merged")

    shutil.rmtree(tmp_path / "merged")

    assert asked(session) == right


@both
def test_a_session_of_an_artifact_that_was_read_through_a_link_is_of_that_directory(kind, releases):
    of = releases(kind)
    read, right = Artifact.read(of.link), asked(Session(of.first))

    of.point(of.other)

    assert asked(Session(read)) == right


@both
def test_a_link_that_is_repointed_while_a_session_opens_changes_nothing(
    kind, releases, monkeypatch
):
    of = releases(kind)
    right = asked(Session(of.first))
    choose = session_module.choose_runner

    def repointing(*arguments):
        of.point(of.other)
        return choose(*arguments)

    monkeypatch.setattr(session_module, "choose_runner", repointing)

    assert asked(Session(of.link)) == right


@both
def test_a_directory_that_is_replaced_while_a_session_opens_is_told(kind, releases, monkeypatch):
    """By one of the same model too, which no manifest would tell."""
    of = releases(kind)
    load = session_module.LoadedModel

    def replacing(*arguments, **options):
        of.put_in_place_of_first(of.second)
        return load(*arguments, **options)

    monkeypatch.setattr(session_module, "LoadedModel", replacing)

    with pytest.raises(ArtifactError, match="was replaced or deleted while it was read"):
        Session(of.link)


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("only transformers loads its tokenizer"),
        ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers"),
    ],
    ids=["transformers", "tokenizers"],
)
def test_tensors_need_no_package_for_texts(error, banked, monkeypatch):
    """Not even at opening; each text is told what is missing."""

    def missing(directory):
        raise error

    monkeypatch.setattr(texts_module, "read_serving_tokenizer", missing)
    session, told = Session(banked), []
    ids = np.array([[5, 6]])

    assert len(session({"input_ids": ids, "attention_mask": np.ones_like(ids)}, "five")) == 1
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)) as raised:
            session(TEXT)
        told.append(raised.value)
    assert told[0] is not told[1]
    assert getattr(told[0], "name", None) == getattr(error, "name", None)
