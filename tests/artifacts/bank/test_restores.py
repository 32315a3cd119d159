"""Files of a bank that come back from a backup, or are another bank's, or are changed in place."""

import os
import shutil
from contextlib import suppress

import numpy as np
import pytest

from propulsion_export.artifacts.bank import BANK_FILE, REGISTRY_FILE, Bank, check_row
from propulsion_export.artifacts.bank import registry as module
from propulsion_export.errors import ArtifactError, UnknownAdapterError

from . import (
    HELD,
    STRIDE,
    check,
    content_of,
    entry,
    numbers,
    put,
    registry,
    row_of,
    seeds_of,
)

# An earlier registry beside later rows


@pytest.fixture
def restored(bank, directory):
    """A snapshot with one adapter more than the bank, whose registry is from before that."""
    before = (directory / REGISTRY_FILE).read_bytes()
    put(bank, "d", 9)
    snapshot = bank.snapshot()
    (directory / REGISTRY_FILE).write_bytes(before)
    return snapshot


def test_a_row_that_others_may_read_is_not_written_over(bank, restored):
    number = restored.rows["d"].number

    assert put(bank, "e", 10).number == number + 1

    np.testing.assert_array_equal(restored.values[number], numbers(9))
    np.testing.assert_array_equal(bank.values()[number], numbers(9))
    assert seeds_of(bank) == HELD | {"e": 10}


def test_rows_that_no_adapter_has_are_dropped_by_compact(bank, restored):
    bank.compact()

    assert seeds_of(bank) == HELD
    assert bank.find_file().stat().st_size == 4 * STRIDE
    number = restored.rows["d"].number
    np.testing.assert_array_equal(restored.values[number], numbers(9))


def test_another_history_is_not_followed_though_its_numbers_are_the_same(bank, restored):
    put(bank, "e", 10)
    now = bank.snapshot()
    assert now.version == restored.version
    assert now.mapped.identity == restored.mapped.identity

    assert not bank.is_at(restored)
    followed = bank.snapshot(restored)
    assert followed.rows == bank.rows()
    assert followed.rows.keys() == {*HELD, "e"}


def test_an_earlier_registry_is_not_taken_for_a_later_one(bank, restored):
    assert not bank.is_at(restored)
    assert bank.snapshot(restored).rows.keys() == HELD.keys()


def test_a_registry_that_comes_back_twice_has_two_histories(bank, directory, restored):
    earlier = (directory / REGISTRY_FILE).read_bytes()
    put(bank, "e", 10)
    first = bank.snapshot()
    (directory / REGISTRY_FILE).write_bytes(earlier)
    put(bank, "f", 11)

    assert seeds_of(bank) == HELD | {"f": 11}
    np.testing.assert_array_equal(first.values[first.rows["e"].number], numbers(10))
    assert bank.snapshot(first).rows == bank.rows()


def test_a_registry_from_before_a_compact_costs_nobody_their_rows(bank, directory):
    before = (directory / REGISTRY_FILE).read_bytes()
    bank.compact()
    after = (directory / REGISTRY_FILE).read_bytes()
    (directory / REGISTRY_FILE).write_bytes(before)

    with pytest.raises(ArtifactError, match=r"bank\.bin: is missing"):
        put(bank, "d", 9)

    (directory / REGISTRY_FILE).write_bytes(after)
    assert seeds_of(bank) == HELD


def test_a_reader_that_missed_more_changes_than_are_kept_reads_all(bank, directory, monkeypatch):
    monkeypatch.setattr(module, "_CHANGES_KEPT", 3)
    snapshot = bank.snapshot()
    for seed in range(10, 15):
        put(bank, "d", seed, replace=True)

    followed = bank.snapshot(snapshot)

    assert followed.rows == bank.rows()
    with registry(directory) as db:
        assert db.execute("SELECT count(*) FROM changes").fetchone() == (3,)


# Rows of another bank


@pytest.fixture
def other(tmp_path):
    """A bank with the same names and as many rows, but other numbers."""
    made = Bank.create(tmp_path / "other", numbers(20))
    for seed, name in enumerate(["a", "x", "b", "c"], 21):
        put(made, name, seed)
    return made


@pytest.mark.parametrize("change", [lambda bank: put(bank, "d", 9), Bank.compact])
def test_another_banks_rows_are_not_changed(bank, other, directory, change):
    shutil.copy(other.find_file(), directory / BANK_FILE)
    before = content_of(directory)

    with pytest.raises(ArtifactError, match=r"row 0 is not the base model's .*nothing was changed"):
        change(bank)

    assert content_of(directory) == before


@pytest.mark.parametrize("file", [BANK_FILE, REGISTRY_FILE])
def test_no_row_of_another_bank_is_taken(bank, other, directory, file):
    shutil.copy(other.directory / file, directory / file)

    for name in HELD:
        with pytest.raises(ArtifactError, match=r"row \d is sha256"):
            check(bank, name)


def test_a_copy_of_rows_that_are_not_the_recorded_ones_is_refused(bank, tmp_path):
    with bank.find_file().open("r+b") as file:
        file.seek(3 * STRIDE)
        file.write(b"1234")

    with pytest.raises(ArtifactError, match="row 3 is sha256"):
        bank.copy(tmp_path / "copy")


# A registry that is changed in place


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE adapters SET name = 'd' WHERE name = 'b'",
        "UPDATE adapters SET entry = (SELECT entry FROM adapters WHERE name = 'a') WHERE name='b'",
        "UPDATE adapters SET checksum = 'sha256:0' WHERE name = 'b'",
    ],
)
def test_a_record_that_was_not_written_for_its_name_is_refused(bank, directory, damage):
    with registry(directory) as db:
        db.execute(damage)

    with pytest.raises(ArtifactError, match="the record of the adapter in row 3 is damaged"):
        bank.rows()
    with pytest.raises(ArtifactError, match="the record of the adapter in row 3 is damaged"):
        row_of(bank, "d" if "SET name" in damage else "b")


def test_an_adapter_is_not_found_in_another_ones_row(bank, directory):
    with registry(directory) as db:
        db.execute("UPDATE adapters SET number = 2 WHERE name = 'b'")

    with pytest.raises(ArtifactError, match="row 2 is sha256"):
        check(bank, "b")


def test_any_byte_of_the_registry_that_is_changed_is_right_or_refused(bank, directory):
    content = (directory / REGISTRY_FILE).read_bytes()
    right = 0
    for place in [n for n in range(0, len(content), 3) if content[n]]:
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        (directory / REGISTRY_FILE).write_bytes(changed)
        for name in (*HELD, "d", "`", "base"):
            with suppress(ArtifactError, UnknownAdapterError):
                (row,), values = Bank.open(directory).choose([name])
                check_row(row, values)
                seed = HELD.get(name, 0)
                assert name in HELD or name == "base", place
                np.testing.assert_array_equal(values[row.number], numbers(seed))
                assert name == "base" or row.entry == entry(seed)
                right += 1
    assert right > 0


# The registry of an earlier version


@pytest.fixture
def old(bank, directory):
    with registry(directory) as db:
        db.execute("ALTER TABLE bank DROP COLUMN change")
        db.execute("ALTER TABLE adapters DROP COLUMN seal")
        db.execute("DROP TABLE changes")
        db.execute("PRAGMA user_version = 1")
    return Bank.open(directory)


def test_a_registry_of_version_1_is_read_as_it_is(old, directory):
    before = content_of(directory)

    assert seeds_of(old) == HELD
    assert row_of(old, "c").entry == entry(4)
    assert not old.is_at(old.snapshot())
    assert old.snapshot(old.snapshot()).rows == old.rows()
    assert content_of(directory) == before


def test_the_next_change_makes_it_one_of_this_version(old, directory):
    earlier = old.snapshot()

    put(old, "d", 9)

    with registry(directory) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        db.execute("UPDATE adapters SET name = 'x' WHERE name = 'd'")
        with pytest.raises(ArtifactError, match="is damaged"):
            old.rows()
        db.execute("UPDATE adapters SET name = 'd' WHERE name = 'x'")
    assert seeds_of(old) == HELD | {"d": 9}
    assert old.is_at(old.snapshot(earlier))


# What is mapped


def test_a_write_in_place_is_seen_though_size_and_time_are_kept(bank):
    mapped, file = bank.snapshot().mapped, bank.find_file()
    moment, before = mapped.moment(), file.stat()
    with file.open("r+b") as rows:
        rows.write(b"1234")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert moment is None or mapped.moment() != moment


def test_a_file_that_has_become_too_short_is_refused(bank):
    mapped = bank.snapshot().mapped
    os.truncate(bank.find_file(), STRIDE)

    with pytest.raises(ArtifactError, match="has become shorter, 20 bytes, expected 100"):
        mapped.moment()


def test_the_descriptor_of_the_file_is_closed_with_the_snapshot(bank):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    snapshots = [bank.snapshot() for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) > before  # noqa: PTH208

    snapshots.clear()

    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
