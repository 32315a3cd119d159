"""One path, two directories: what a session and a command read when a link is repointed.

Releases are switched by a link, `current -> release-1`. What is computed is always of one release,
and what is written goes to the one that was meant or nowhere.
"""

import hashlib
import json
import pickle
import shutil
import threading
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import numpy as np
import pytest
from text_artifacts import exchange_words

from propulsion_export.adapters import adapter as adapter_module
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts import changing as changing_module
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter, compact_bank, remove_adapter
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import read_manifest
from propulsion_export.errors import (
    ArtifactError,
    UnavailableError,
    UnknownAdapterError,
    UsageError,
)
from propulsion_export.serving import roster as roster_module
from propulsion_export.serving import session as session_module
from propulsion_export.serving import texts as texts_module
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session

KINDS = ("switchable", "banked")
TEXT = "ba be"
both = pytest.mark.parametrize("kind", KINDS)


class Releases:
    """`current`, a link to the first of three releases; the third is of another model.

    In `second` the adapter `three` is another one and `new` is there too; the tokenizer of `other`
    has two words in each other's place.
    """

    def __init__(self, artifact, root, five):
        self.link = root / "current"
        self.first, self.second, self.other, self.empty = (
            root / name for name in ("release-1", "release-2", "release-3", "nothing")
        )
        for release in (self.first, self.second, self.other):
            shutil.copytree(artifact, release)
        self.empty.mkdir()
        add_adapter(self.second, f"three={five}", force=True)
        add_adapter(self.second, f"new={five}")
        swap_words(self.other)
        self.point(self.first)

    def point(self, to):
        aside = self.link.with_name("next")
        aside.symlink_to(to)
        aside.replace(self.link)

    def put_in_place_of_first(self, other):
        self.first.rename(self.first.with_name("gone"))
        other.rename(self.first)

    def contents(self):
        """The digest of every file of all releases."""
        root = self.link.parent
        files = [
            path
            for release in root.iterdir()
            if not release.is_symlink()
            for path in release.rglob("*")
            if path.is_file()
        ]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def swap_words(release):
    manifest = Artifact.read(release).manifest
    exchange_words(release)
    Artifact.write(release, manifest)


@pytest.fixture
def releases(switchable, banked, world, tmp_path):
    places = {"switchable": switchable, "banked": banked}
    return lambda kind: Releases(places[kind], tmp_path / kind, world.five)


@pytest.fixture(autouse=True)
def _root(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()


def asked(session, name="three"):
    [reply] = session(TEXT, name)
    return reply.version, reply.prediction, reply.outputs["logits"].tolist()


@both
def test_the_releases_can_be_told_apart(kind, releases):
    """Else no test here could fail."""
    of = releases(kind)
    first, second, other = (asked(Session(r)) for r in (of.first, of.second, of.other))

    assert first[0] == other[0] != second[0]
    assert len({json.dumps(answer[2]) for answer in (first, second, other)}) == 3


# Opening


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


# Refreshing


@both
def test_a_refresh_goes_over_to_the_release_that_the_link_leads_to_as_a_whole(
    kind, releases, world
):
    of = releases(kind)
    session, right = Session(of.link), asked(Session(of.second))
    of.point(of.second)
    before = of.contents()

    session.refresh()

    assert asked(session) == right
    assert session.adapters == ("five", "new", "three")
    assert of.contents() == before
    session.add(f"later={world.three}")
    session.remove("new")
    assert sorted(Artifact.read(of.second).list_adapters()) == ["five", "later", "three"]
    assert sorted(Artifact.read(of.first).list_adapters()) == ["five", "three"]
    of.point(of.first)
    session.refresh()
    assert asked(session) == asked(Session(of.first))


@both
def test_a_refresh_refuses_another_model_and_nothing_changes(kind, releases):
    of = releases(kind)
    session = Session(of.link)
    right, before = asked(session), of.contents()
    of.point(of.other)

    with pytest.raises(ArtifactError, match=r"release-3: is another model than .*release-1, which"):
        session.refresh()

    assert asked(session) == right
    assert session.adapters == ("five", "three")
    assert of.contents() == before
    of.point(of.second)
    session.refresh()
    assert asked(session) == asked(Session(of.second))


@both
def test_a_refresh_while_the_link_is_repointed_reads_one_release(kind, releases, monkeypatch):
    of = releases(kind)
    session, right = Session(of.link), asked(Session(of.second))
    of.point(of.second)
    read = roster_module.read_manifest

    def repointing(file):
        of.point(of.first)
        return read(file)

    monkeypatch.setattr(roster_module, "read_manifest", repointing)
    session.refresh()

    assert asked(session) == right
    assert session.adapters == ("five", "new", "three")


@both
def test_a_directory_that_is_replaced_while_it_is_refreshed_is_told(kind, releases, monkeypatch):
    of = releases(kind)
    session, right = Session(of.link), asked(Session(of.first))
    read = roster_module.read_manifest

    def replacing(file):
        manifest = read(file)
        monkeypatch.undo()
        of.put_in_place_of_first(of.second)
        return manifest

    monkeypatch.setattr(roster_module, "read_manifest", replacing)
    with pytest.raises(ArtifactError, match="was replaced or deleted while it was read"):
        session.refresh()
    unchanged = asked(session)
    session.refresh()

    assert unchanged == right
    assert session.adapters == ("five", "new", "three")


def test_a_refresh_that_verifies_a_large_release_holds_no_request_up(releases, monkeypatch):
    """An unknown name is looked up on disk, and would wait for the same lock."""
    of = releases("banked")
    session, read = Session(of.link), session_module._read
    reading, go_on = threading.Event(), threading.Event()
    of.point(of.second)

    def slow(place):
        reading.set()
        assert go_on.wait(60)
        return read(place)

    def ask_in_vain():
        with pytest.raises(UnknownAdapterError):
            session(TEXT, "x")

    monkeypatch.setattr(session_module, "_read", slow)
    refreshing = threading.Thread(target=session.refresh)
    refreshing.start()
    asking = threading.Thread(target=ask_in_vain)
    try:
        assert reading.wait(60)
        asking.start()
        asking.join(20)
        assert not asking.is_alive()
    finally:
        go_on.set()
        refreshing.join()
        asking.join()
    assert session.adapters == ("five", "new", "three")


def test_releases_that_share_a_file_of_rows_are_not_taken_for_each_other(releases):
    """As with rsync's --link-dest: the same inode, and the same number of changes."""
    of = releases("banked")
    shutil.rmtree(of.second)
    shutil.copytree(of.first, of.second)
    (of.second / "adapters/bank.bin").unlink()
    (of.second / "adapters/bank.bin").hardlink_to(of.first / "adapters/bank.bin")
    remove_adapter(of.first, "three")
    remove_adapter(of.second, "five")
    session = Session(of.link)

    of.point(of.second)
    session.refresh()

    assert session.adapters == ("three",)


# Changing


@both
@pytest.mark.parametrize("happens", ["repointed", "replaced"])
def test_a_session_changes_no_directory_but_the_one_that_it_serves(kind, happens, releases, world):
    of = releases(kind)
    session = Session(of.link)
    if happens == "repointed":
        of.point(of.second)
    else:
        of.put_in_place_of_first(of.second)
    before = of.contents()

    with pytest.raises(UsageError, match=r"nothing was changed\. Refresh the session"):
        session.add(f"later={world.three}")
    with pytest.raises(UsageError, match=r"current: is another directory now \(.*release"):
        session.remove("five")

    assert of.contents() == before
    assert session.adapters == ("five", "three")
    session.refresh()
    session.add(f"later={world.three}")
    assert session.adapters == ("five", "later", "new", "three")


@both
@pytest.mark.parametrize("change", ["add", "remove", "refresh"])
def test_a_deleted_directory_is_told_as_that(kind, change, releases, world):
    of = releases(kind)
    session, right = Session(of.link), asked(Session(of.first))
    shutil.rmtree(of.first)
    arguments = {"add": [f"later={world.three}"], "remove": ["five"], "refresh": []}[change]

    with pytest.raises(ArtifactError, match="current: was deleted after it was read"):
        getattr(session, change)(*arguments)

    assert asked(session) == right


def change(what, path, world):
    if what == "add":
        add_adapter(path, f"later={world.three}")
    elif what == "remove":
        remove_adapter(path, "five")
    else:
        compact_bank(path)


@both
@pytest.mark.parametrize("what", ["add", "remove", "compact"])
def test_a_change_that_waits_for_a_lock_goes_where_the_link_led_or_nowhere(
    kind, what, releases, world, monkeypatch
):
    of = releases(kind)
    lock, before = changing_module.exclusive_lock, of.contents()

    @contextmanager
    def waiting(directory):
        with lock(directory):
            of.point(of.second)
            yield

    monkeypatch.setattr(changing_module, "exclusive_lock", waiting)
    with pytest.raises(UsageError, match=r"is another directory now .* nothing was changed"):
        change(what, of.link, world)

    assert of.contents() == before


@both
def test_a_pickled_session_is_of_the_release_that_it_served(kind, releases):
    of = releases(kind)
    session, right = Session(of.link), asked(Session(of.first))
    of.point(of.second)

    again = pickle.loads(pickle.dumps(session))

    assert asked(again) == right
    again.refresh()
    assert asked(again) == asked(Session(of.second))


# Volumes of Kubernetes, whose files are links through `..data`


def as_volume(of):
    """`first` and `second` as two states of a volume, in the place of the link."""
    of.link.unlink()
    of.link.mkdir()
    for release in (of.first, of.second):
        release.rename(of.link / f"..{release.name}")
    data = of.link / "..data"
    data.symlink_to("..release-1")
    for file in (of.link / "..release-1").iterdir():
        (of.link / file.name).symlink_to(f"..data/{file.name}")

    def switch():
        (of.link / "..next").symlink_to("..release-2")
        (of.link / "..next").replace(data)

    return switch


@both
def test_a_volume_that_is_switched_is_read_from_one_state_and_followed(kind, releases):
    of = releases(kind)
    first, second = asked(Session(of.first)), asked(Session(of.second))
    switch = as_volume(of)
    read, session = Artifact.read(of.link), Session(of.link)

    switch()

    assert read.directory == of.link / "..release-1"
    assert asked(Session(read)) == asked(session) == first
    session.refresh()
    assert asked(session) == second


# Commands


def run(path, out, world):
    from propulsion_export.pipeline.run import predict

    return predict(path, text=[TEXT], adapter=["three"])


def package_(path, out, world):
    from propulsion_export.pipeline.package import package

    return sorted(package(path, out, layout="onnx-adapter").adapters), digests(out)


def fold(path, out, world):
    from propulsion_export.pipeline.fold_onnx import fold_onnx

    fold_onnx([world.three], out, from_artifact=path)
    return digests(out)


def parity(path, out, world):
    from propulsion_export.pipeline.parity import check_parity

    return check_parity(path, effort="quick").passed


def inspect(path, out, world):
    return described(["inspect", path])


def list_(path, out, world):
    return described(["adapter", "list", path])


def described(arguments):
    from propulsion_export.cli import main

    with redirect_stdout(StringIO()) as shown, pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    assert ended.value.code in (0, None)
    return json.loads(shown.getvalue())


def digests(directory):
    """The digests of the files but for ONNX Runtime's own, whose bytes have no fixed order."""
    files = Artifact.read(directory).manifest.files
    return {name: files[name] for name in files if not name.endswith(".onnx_adapter")}


@pytest.mark.parametrize("command", [run, package_, fold, parity, inspect, list_])
def test_a_command_reads_the_directory_that_the_link_led_to_when_it_began(
    command, releases, world, tmp_path, monkeypatch
):
    of = releases("switchable")
    right = command(of.first, tmp_path / "right", world)
    read = Artifact.read.__func__

    def repointing(kind, directory, **options):
        artifact = read(kind, directory, **options)
        of.point(of.empty)
        return artifact

    monkeypatch.setattr(Artifact, "read", classmethod(repointing))

    assert command(of.link, tmp_path / "out", world) == right


def test_a_bank_is_listed_from_the_directory_that_the_link_led_to(releases, monkeypatch):
    of = releases("banked")
    read = Artifact.read(of.link)

    of.point(of.empty)

    assert sorted(read.list_adapters()) == ["five", "three"]
    assert len(read.open_bank()) == 2


def test_messages_name_the_path_that_the_user_gave(releases, world, monkeypatch, tmp_path):
    of = releases("switchable")
    with pytest.raises(UsageError, match="current: has an adapter 'three' already"):
        add_adapter(of.link, f"three={world.five}")
    with pytest.raises(UnknownAdapterError, match="current: has no adapter 'nine'"):
        Artifact.read(of.link).feeds("nine")
    (of.first / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"current/config\.json: is missing"):
        Artifact.read(of.link)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"^switchable/release-1/config\.json: is missing"):
        Artifact.read("switchable/release-1")


# Adapters


def test_an_adapter_is_read_from_the_directory_that_its_link_led_to(
    world, tmp_path, monkeypatch, switchable
):
    """Its tensors, and all that lies beside them: a tokenizer, a chat template, a pipeline."""
    link = tmp_path / "latest"
    link.symlink_to(world.three)
    directory = shutil.copytree(switchable, tmp_path / "artifact")
    read = adapter_module.read_peft_directory

    def repointing(place):
        found = read(place)
        link.unlink()
        link.symlink_to(tmp_path)
        return found

    monkeypatch.setattr(adapter_module, "read_peft_directory", repointing)
    added = add_adapter(directory, link)

    assert added.manifest.adapters["latest"].source == str(world.three)
    assert added.manifest.adapters["latest"].digest == Adapter.read(world.three).digest


def test_merging_reads_an_adapter_from_the_directory_that_its_link_led_to(
    world, tmp_path, monkeypatch
):
    from propulsion_export.pipeline.merge import merge

    link = tmp_path / "latest"
    link.symlink_to(world.three)
    right = merge(world.three, tmp_path / "right").manifest
    read = adapter_module.read_peft_directory

    def repointing(place):
        link.unlink()
        link.symlink_to(tmp_path)
        return read(place)

    monkeypatch.setattr(adapter_module, "read_peft_directory", repointing)
    found = merge(link, tmp_path / "out").manifest

    assert found.files == right.files
    assert found.adapters["latest"].source == str(world.three)
