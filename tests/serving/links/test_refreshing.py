"""A refresh follows a link to another release as a whole, or changes nothing."""

import shutil
import threading

import pytest
from releases import TEXT, asked, both

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import remove_adapter
from propulsion_export.errors import ArtifactError, UnknownAdapterError
from propulsion_export.serving import roster as roster_module
from propulsion_export.serving import session as session_module
from propulsion_export.serving.session import Session

# Links to releases


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
