"""A roster is the adapters of one moment: what changes later, or behind its back, changes nothing.

Which roster a request gets, and what it computes with it, is in `test_session_rows.py` and
`test_session_changes.py`.
"""

import fcntl
import gc
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts import watched_file
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.errors import ArtifactError, UnknownAdapterError
from propulsion_export.serving import roster as roster_module
from propulsion_export.serving.roster import BankRoster, PackedRoster


@pytest.fixture
def copies(switchable, banked, tmp_path):
    """`copies(kind)`: a switchable export or a bank that the test may change."""
    sources = {"switchable": switchable, "bank": banked}
    return lambda kind: shutil.copytree(sources[kind], tmp_path / kind)


def read(directory, before=None):
    artifact = Artifact.read(directory) if before is None else before.artifact
    if artifact.manifest.mode == "bank":
        return BankRoster.read(artifact, np.asarray, before)
    return PackedRoster.read(artifact, before)


def fed(group):
    """The numbers that each row of a group computes with, [rows, D]."""
    if BANK_INPUT in group.feeds:
        return group.feeds[BANK_INPUT][group.feeds[IDS_INPUT]]
    packed = np.concatenate(list(group.feeds.values()))
    return np.tile(packed, (len(group.rows), 1))


BOTH = pytest.mark.parametrize("kind", ["switchable", "bank"])


@BOTH
def test_every_row_is_fed_its_own_adapter(kind, copies):
    roster = read(copies(kind))
    names = ["three", "base", "five", "three", "five"]

    groups = roster.groups(names, 2)

    found = {}
    for group in groups:
        assert len(group.rows) == len(group.choices) == len(fed(group)) <= 2
        for row, choice, values in zip(group.rows, group.choices, fed(group), strict=True):
            assert choice.adapter == names[row]
            found[row] = values
    assert sorted(found) == [0, 1, 2, 3, 4]
    alone = {name: fed(roster.groups([name], 1)[0])[0] for name in names}
    assert len({values.tobytes() for values in alone.values()}) == 3
    for row, name in enumerate(names):
        np.testing.assert_array_equal(found[row], alone[name])


def test_a_bank_has_rows_of_any_adapters_in_one_group(copies):
    names = ["three", "base", "five"] * 10
    bank, switchable = read(copies("bank")), read(copies("switchable"))

    assert [len(group.rows) for group in bank.groups(names, 32)] == [30]
    assert [len(group.rows) for group in switchable.groups(names, 32)] == [10, 10, 10]


@BOTH
def test_versions_and_labels_are_those_of_the_adapters(kind, copies, world):
    roster = read(copies(kind))

    for group in roster.groups(["three", "five", "base"], 9):
        for choice in group.choices:
            if choice.adapter == "base":
                digests = {Adapter.read(adapter).digest for adapter in (world.three, world.five)}
                assert choice.version not in digests
                assert choice.labels == ("three-0", "three-1", "three-2")
                continue
            adapter = Adapter.read(getattr(world, choice.adapter))
            assert (choice.version, choice.labels) == (adapter.digest, adapter.labels)


@BOTH
def test_what_changes_later_is_in_the_next_roster_and_not_in_this_one(kind, copies, world):
    directory = copies(kind)
    roster = read(directory)
    before = [fed(group).copy() for group in roster.groups(["three", "five"], 1)]

    add_adapter(directory, f"three={world.five}", force=True)
    remove_adapter(directory, "five")
    add_adapter(directory, f"new={world.five}")
    later = read(directory, roster)

    after = [fed(group) for group in roster.groups(["three", "five"], 1)]
    np.testing.assert_array_equal(before, after)
    assert (roster.names, later.names) == (("five", "three"), ("new", "three"))
    assert not np.array_equal(fed(later.groups(["three"], 1)[0])[0], before[0][0])
    with pytest.raises(
        UnknownAdapterError, match="no adapter 'new', expected one of base, five, three"
    ):
        roster.groups(["new"], 1)


@BOTH
def test_a_roster_of_the_same_adapters_is_the_same(kind, copies):
    directory = copies(kind)
    roster = read(directory)

    assert read(directory, roster) is roster


@BOTH
def test_another_model_in_the_directory_is_refused(kind, copies, switchable, banked, world):
    """Its rows would be fed to the graph that was loaded before."""
    directory = copies(kind)
    roster = read(directory)
    base = replace(roster.artifact.manifest.base, source="elsewhere")
    roster.artifact.with_manifest(replace(roster.artifact.manifest, base=base))

    with pytest.raises(ArtifactError, match="has become another model since it was loaded"):
        read(directory, roster)


def test_adapter_files_are_read_while_nobody_is_changing_them(copies, world):
    """Else one that the manifest names may be gone, or be that of a later adapter."""
    directory = copies("switchable")
    roster, found = read(directory), []
    add_adapter(directory, f"new={world.three}")
    changing = os.open(directory, os.O_RDONLY)
    fcntl.flock(changing, fcntl.LOCK_EX)
    reader = threading.Thread(target=lambda: found.append(read(directory, roster)))

    reader.start()
    reader.join(0.5)
    early = list(found)
    os.close(changing)
    reader.join()

    assert early == []
    assert found[0].names == ("five", "new", "three")


def test_a_bank_keeps_the_rows_it_began_with_when_it_is_compacted(copies, world):
    directory = copies("bank")
    add_adapter(directory, f"other={world.three}")
    roster = read(directory)
    [group] = roster.groups(["other", "three", "base"], 3)
    before = fed(group).copy()

    remove_adapter(directory, "five")
    Artifact.read(directory).open_bank().compact()
    add_adapter(directory, f"three={world.five}", force=True)
    later = read(directory, roster)
    del roster
    gc.collect()

    np.testing.assert_array_equal(fed(group), before)
    assert not np.array_equal(fed(later.groups(["three"], 1)[0])[0], before[1])


def test_a_damaged_row_is_refused_whenever_it_came_and_the_others_are_not(copies, world):
    directory = copies("bank")
    roster = read(directory)
    roster.groups(["three", "five"], 2)
    add_adapter(directory, f"new={world.three}")
    bank = Artifact.read(directory).open_bank()
    with bank.find_file().open("r+b") as file:
        file.seek(bank.rows()["new"].number * bank.width * 4 + 40)
        file.write(b"\x00\x00\x80\x7f")

    later = read(directory, roster)

    with pytest.raises(ArtifactError, match=r"row \d is sha256"):
        later.groups(["three", "new"], 2)
    later.groups(["three", "five", "base"], 3)


@pytest.fixture
def checks(monkeypatch):
    """The rows that are compared with their checksums, by number."""
    check, done = roster_module.check_row, []

    def counting(row, values):
        done.append(row.number)
        check(row, values)

    monkeypatch.setattr(roster_module, "check_row", counting)
    monkeypatch.setattr(watched_file, "_CLOCK_TICK", 0)
    return done


def test_a_row_is_checked_once_until_something_is_written(copies, world, checks):
    directory = copies("bank")
    roster = read(directory)
    for _ in range(3):
        roster.groups(["three", "five", "three"], 3)
    assert checks == [1, 2]

    add_adapter(directory, f"new={world.three}")
    for _ in range(3):
        roster.groups(["three"], 1)
    assert checks == [1, 2, 1]

    later = read(directory, roster)
    for _ in range(3):
        later.groups(["five"], 1)
    assert checks == [1, 2, 1, 2]


def test_a_row_is_checked_each_time_while_the_next_write_could_go_unseen(
    copies, checks, monkeypatch
):
    roster = read(copies("bank"))
    monkeypatch.setattr(watched_file, "_CLOCK_TICK", 10**18)

    for _ in range(3):
        roster.groups(["three"], 1)

    assert checks == [1, 1, 1]


def test_a_row_that_changes_under_its_users_is_refused_and_others_are_not(copies):
    """Its size and its time are as before."""
    directory = copies("bank")
    roster = read(directory)
    roster.groups(["three", "five"], 2)
    file = Artifact.read(directory).open_bank().find_file()
    before = file.stat()
    with file.open("r+b") as rows:
        rows.seek(roster.snapshot.rows["three"].number * before.st_size // 3 + 40)
        rows.write(b"\x01\x02\x03\x3f")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(ArtifactError, match="row 1 is sha256"):
        roster.groups(["three"], 1)
    roster.groups(["five", "base"], 2)


def test_a_bank_that_is_cut_off_under_its_users_is_refused_and_does_not_crash_them(copies):
    directory = copies("bank")
    roster = read(directory)
    os.truncate(Artifact.read(directory).open_bank().find_file(), 40)

    with pytest.raises(ArtifactError, match="has become shorter, 40 bytes, expected"):
        roster.groups(["three"], 1)


def test_all_unknown_names_are_told_and_not_too_many_known_ones(copies, world):
    directory = copies("bank")
    for number in range(12):
        add_adapter(directory, f"a{number:02}={world.three}")

    with pytest.raises(UnknownAdapterError) as raised:
        read(directory).groups(["x", "three", "y", "x"], 4)

    shown = "base, a00, a01, a02, a03, a04, a05, a06 and 7 more"
    assert [f"no adapter {name!r}, expected one of {shown}" in text for name, text in zip(
        "xy", raised.value.findings, strict=True
    )] == [True, True]  # fmt: skip


def test_a_folded_artifact_has_one_adapter_and_no_base_model(folded):
    roster = read(folded)

    assert roster.default == "three"
    [group] = roster.groups(["three", "three"], 9)
    assert (group.feeds, list(group.rows)) == ({}, [0, 1])
    for name in ("base", "five"):
        with pytest.raises(UnknownAdapterError, match=f"'three' folded in, expected no .*'{name}'"):
            roster.groups(["three", name], 9)
