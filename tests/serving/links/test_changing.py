"""What is changed through a link is the directory that it led to, or nothing."""

import pickle
import shutil
from contextlib import contextmanager

import pytest
from releases import asked, both

from propulsion_export.artifacts import changing as changing_module
from propulsion_export.artifacts.changing import add_adapter, compact_bank, remove_adapter
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.serving.session import Session


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
    with pytest.raises(UsageError, match=r"replaced since|release-1\); nothing") as told:
        session.remove("five")
    assert str(told.value).count("release-1") == 1

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

    with pytest.raises(ArtifactError, match="current: is no directory any more"):
        getattr(session, change)(*arguments)

    assert asked(session) == right


@both
def test_a_session_of_a_deleted_directory_is_opened_nowhere_else(kind, releases):
    of = releases(kind)
    pickled = pickle.dumps(Session(of.link))
    shutil.rmtree(of.first)

    with pytest.raises(ArtifactError, match=r"release-1: does not exist, expected"):
        pickle.loads(pickled)
    with pytest.raises(ArtifactError, match=r"current: does not exist, expected"):
        Session(of.link)


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
