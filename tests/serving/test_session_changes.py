"""Adapters come, go and are replaced while a session answers."""

import gc
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
from session_inputs import KINDS, ROWS, TEXTS, random_inputs

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import REGISTRY_FILE
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.errors import UnknownAdapterError, UsageError
from propulsion_export.serving.session import Session


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_session_changes_the_next_request_sees(kind, copied, world):
    session = Session(copied(kind))
    [three] = session("ba be", "three")

    session.add(f"new={world.three}")
    assert session.adapters == ("five", "new", "three")
    [new] = session("ba be", "new")
    session.add(f"new={world.five}", force=True)
    [replaced] = session("ba be", "new")
    session.remove("new")

    assert (new.prediction, new.version) == (three.prediction, three.version)
    assert replaced.version == Adapter.read(world.five).digest
    assert replaced.labels == Adapter.read(world.five).labels
    with pytest.raises(UnknownAdapterError, match="no adapter 'new'"):
        session("ba be", "new")
    with pytest.raises(UsageError, match="has an adapter 'three' already"):
        session.add(f"three={world.five}")
    assert session("ba be", "three")[0].version == three.version


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_stays_with_its_artifact_wherever_the_process_goes(
    kind, copied, world, tmp_path, monkeypatch
):
    here = copied(kind)
    other = shutil.copytree(here, tmp_path / "other" / here.name)
    monkeypatch.chdir(tmp_path)
    session = Session(here.name)
    monkeypatch.chdir(other.parent)

    session.add(f"new={world.three}")

    assert session("ba be", "new")[0].adapter == "new"
    assert sorted(Artifact.read(here).list_adapters()) == ["five", "new", "three"]
    assert sorted(Artifact.read(other).list_adapters()) == ["five", "three"]
    assert pickle.loads(pickle.dumps(session)).adapters == ("five", "new", "three")


@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_sees_another_artifact_of_the_same_model_in_its_place(
    kind, copied, world, tmp_path
):
    here = copied(kind)
    other = shutil.copytree(here, tmp_path / "other")
    add_adapter(here, f"x={world.three}")
    add_adapter(other, f"x={world.five}")
    session = Session(here)
    before = session("ba be", "x")[0].version
    here.rename(tmp_path / "gone")
    other.rename(here)

    session.refresh()

    assert before == Adapter.read(world.three).digest
    assert session("ba be", "x")[0].version == Adapter.read(world.five).digest


@pytest.mark.parametrize("kind", KINDS)
def test_of_what_others_change_new_names_are_seen_and_the_rest_after_a_refresh(kind, copied, world):
    directory = copied(kind)
    session = Session(directory)
    [before] = session("ba be", "three")

    another_process(f"""
        add_adapter(Path({str(directory)!r}), "three={world.five}", force=True)
        add_adapter(Path({str(directory)!r}), "new={world.three}")
    """)

    assert session("ba be", "three")[0].version == before.version
    [new] = session("ba be", "new")  # and with it comes all else
    assert (new.version, new.prediction) == (before.version, before.prediction)
    assert session("ba be", "three")[0].version == Adapter.read(world.five).digest
    Session(directory).add(f"three={world.three}", force=True)
    assert session("ba be", "three")[0].version == Adapter.read(world.five).digest
    session.refresh()
    assert session("ba be", "three")[0].version == before.version


def another_process(lines):
    """Run lines of Python in one."""
    program = "from pathlib import Path\nfrom propulsion_export import add_adapter\n"
    program += "\n".join(line.strip() for line in lines.splitlines())
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_an_unknown_name_does_not_read_the_whole_artifact_again(copied, monkeypatch):
    """Else anybody who may name an adapter could keep a server busy with its weights."""
    for kind in KINDS:
        session = Session(copied(kind))
        monkeypatch.setattr(Artifact, "read", lambda *_: pytest.fail("was read again"))

        with pytest.raises(UnknownAdapterError, match="no adapter 'nine'"):
            session("ba", "nine")
        monkeypatch.undo()


def test_a_name_that_nobody_gave_is_looked_up_where_it_came_from(copied, world):
    """The only adapter is the default; with two it is the base model."""
    directory = copied("switchable")
    remove_adapter(directory, "five")
    session = Session(directory)
    before = session._roster

    class Swapping(type(before)):
        """Between the two looks at it another thread has changed the adapters."""

        @property
        def default(self):
            session.add(f"four={world.five}")
            session.remove("three")
            return super().default

    session._roster = Swapping(**vars(before))

    assert session("ba be")[0].adapter == "three"
    assert session("ba be")[0].adapter == "four"


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_has_one_version_of_a_name_while_it_is_replaced(kind, copied, world):
    directory = copied(kind)
    session, other = Session(directory), Session(directory)
    session.add(f"x={world.three}")
    labels = {Adapter.read(d).digest: Adapter.read(d).labels for d in (world.three, world.five)}
    texts = [TEXTS[row % 8] for row in range(64)]
    seen, over = set(), threading.Event()

    def change():
        turn = 0
        while not over.is_set():
            turn += 1
            who = session if turn % 2 else other
            who.add(f"x={(world.three, world.five)[turn % 2]}", force=True)
            if turn % 3 == 0:
                other.add(f"y={world.three}")
                session.refresh()
                other.remove("y")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(40):
            replies = session(texts, ["x", "three", "x", "base"] * 16)
            versions = {reply.version for reply in replies if reply.adapter == "x"}
            assert len(versions) == 1
            assert all(r.labels == labels[r.version] for r in replies if r.adapter == "x")
            assert all(len(r.outputs["logits"]) == len(r.labels) for r in replies)
            seen |= versions
    finally:
        over.set()
        changer.join()
    assert seen == labels.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_opens_while_others_change_the_artifact(kind, copied, world):
    """Files that the manifest named a moment ago may be gone."""
    directory = copied(kind)
    other, over = Session(directory), threading.Event()

    def change():
        while not over.is_set():
            other.add(f"x={world.three}", force=True)
            other.remove("x")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(10):
            session = Session(directory)
            assert {"three", "five"} <= set(session.adapters) <= {"three", "five", "x"}
            session.refresh()
    finally:
        over.set()
        changer.join()


# The bank stays where it is


def resident():
    """Bytes of memory that belong to this process alone, and of all its memory."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        lines = dict(line.split(":", 1) for line in status)
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))


def test_a_large_bank_is_mapped_and_not_copied(copied, world):
    directory = copied("banked")
    bank = Artifact.read(directory).open_bank()
    stride = bank.width * 4
    rows = 256 * 2**20 // stride
    with sqlite3.connect(directory / REGISTRY_FILE) as db:  # as if as many had come and gone
        db.execute("UPDATE bank SET next_row = ?", (rows,))
    db.close()
    os.truncate(bank.find_file(), rows * stride)
    Session(directory)("ba be")  # what loading costs anyway
    gc.collect()
    anonymous, everything = resident()

    session = Session(directory)
    session.add(f"last={world.five}")
    replies = session(TEXTS, ["last", "three", "base", "five"] * 2)

    grown = np.subtract(resident(), (anonymous, everything))
    values = session._roster.snapshot.values
    assert values.nbytes >= 256 * 2**20
    assert session._roster.placed.value.data_ptr() == values.ctypes.data
    assert session._roster.snapshot.rows["last"].number == rows
    assert (grown < 40 * 2**20).all(), grown
    assert replies[0].prediction["label"].startswith("five-")


def test_a_request_in_flight_keeps_the_bank_that_it_began_with(copied, world):
    directory = copied("banked")
    session = Session(directory)
    session.add(f"gone={world.five}")
    inputs, names = random_inputs(), ["three", "gone", "base", "three"] * 4
    before = [reply.outputs["logits"] for reply in session(inputs, names)]
    [group] = session._roster.groups(names, ROWS)

    session.remove("five")
    session.remove("gone")
    Artifact.read(directory).open_bank().compact()
    session.add(f"three={world.five}", force=True)
    gc.collect()

    assert [path.name for path in directory.glob("adapters/bank*.bin")] == ["bank-1.bin"]
    for logits, reply in zip(before, session._model.answer_tensors(inputs, group), strict=True):
        np.testing.assert_array_equal(logits, reply.outputs["logits"])
    assert session(inputs, "three")[0].version == Adapter.read(world.five).digest
