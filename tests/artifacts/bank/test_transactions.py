import errno
import os

import pytest

from propulsion_export.artifacts.bank import (
    BANK_FILE,
    REGISTRY_FILE,
    Bank,
    transactions,
)
from propulsion_export.artifacts.manifest import AdapterEntry
from propulsion_export.errors import ArtifactError, UsageError

from . import (
    HELD,
    STRIDE,
    content_of,
    entry,
    half_committed,
    numbers,
    output_of,
    put,
    registry,
    row_of,
    seeds_of,
    start,
)

# Disks that are full, read-only or locked


def refuse_after(count):
    """An os.pwrite that has room for so many bytes."""
    whole = os.pwrite

    def pwrite(descriptor, data, offset):
        if whole(descriptor, data[:count], offset) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return count

    return pwrite


@pytest.mark.parametrize("change", [lambda bank: put(bank, "d", 9), Bank.compact])
def test_a_full_disk_leaves_the_bank_as_it_was(bank, directory, change, monkeypatch):
    before = content_of(directory)
    monkeypatch.setattr(os, "pwrite", refuse_after(3))

    with pytest.raises(UsageError, match=r"no space left .*written\. Make room there"):
        change(bank)

    assert content_of(directory) == before


def test_a_disk_that_is_full_at_the_commit_leaves_the_bank_as_it_was(bank, directory, monkeypatch):
    before = content_of(directory)
    connect = transactions._connect

    def full(*arguments):
        db = connect(*arguments)
        db.execute("PRAGMA max_page_count = 1")  # no page more than there are
        return db

    monkeypatch.setattr(transactions, "_connect", full)
    large = AdapterEntry("sha256:9", "/" * 20_000, 9)
    with pytest.raises(UsageError, match="no space left on the device; nothing was changed"):
        bank.add("d", numbers(9), large)

    assert content_of(directory) == before


# The system lets no file of this process grow beyond 110 bytes: half a row more than there are.
LIMITED = """
import resource
bank = Bank.open(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (110, 110))
try:
    put(bank, "d", 9)
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def test_a_file_that_the_system_lets_not_grow_leaves_the_bank_as_it_was(bank, directory):
    before = content_of(directory)

    ((kind, message),) = output_of(start(LIMITED, directory))

    assert kind == "UsageError"
    assert "the file may not grow that large; nothing was written" in message
    assert content_of(directory) == before


def test_what_a_killed_process_left_is_removed_by_the_next_change(bank, directory):
    with bank.find_file().open("ab") as file:
        file.write(b"half a row")
    stray = directory / "adapters/bank-1.bin"
    stray.write_bytes(b"half a bank")
    other = directory / "adapters/bank-of-others.bin"
    other.write_bytes(b"not ours")
    assert seeds_of(Bank.open(directory)) == HELD

    bank.remove("a")

    assert bank.find_file().stat().st_size == 5 * STRIDE
    assert not stray.exists()
    assert other.exists()


def test_a_read_only_directory_is_read_and_nothing_is_made_in_it(bank, directory):
    places = [directory / BANK_FILE, directory / REGISTRY_FILE, directory / "adapters", directory]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    before = [(place, place.stat().st_mtime_ns) for place in places], content_of(directory)

    try:
        opened = Bank.open(directory)
        assert seeds_of(opened) == HELD
        assert row_of(opened, "c").entry == entry(4)
        if os.geteuid():  # root may write everywhere
            with pytest.raises(UsageError, match="no permission to write here"):
                put(opened, "d", 9)
        assert before == (
            [(place, place.stat().st_mtime_ns) for place in places],
            content_of(directory),
        )
    finally:
        for place in reversed(places):
            place.chmod(0o755 if place.is_dir() else 0o644)


def read_only(monkeypatch):
    """Let SQLite open every database as it does on a read-only disk."""
    connect = transactions._connect
    monkeypatch.setattr(transactions, "_connect", lambda directory, mode: connect(directory, "ro"))


def test_a_registry_that_may_not_be_written_is_told_in_words(bank, directory, monkeypatch):
    before = content_of(directory)
    read_only(monkeypatch)
    with pytest.raises(UsageError, match=r"registry\.sqlite: no permission to write here"):
        put(bank, "d", 9)
    with pytest.raises(UsageError, match=r"registry\.sqlite: no permission to write here"):
        bank.remove("a")
    assert content_of(directory) == before


def test_a_half_changed_registry_that_may_not_be_written_is_told_in_words(
    bank, directory, tmp_path, monkeypatch
):
    half_committed(directory, tmp_path / "copy")
    read_only(monkeypatch)
    with pytest.raises(ArtifactError, match="a killed process left it half changed"):
        Bank.open(tmp_path / "copy")


def test_a_registry_that_stays_locked_is_told_in_words(bank, directory, monkeypatch):
    monkeypatch.setattr(transactions, "_PATIENCE", 0.05)
    with registry(directory) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ArtifactError, match=r"stays locked by another process.*has ended"):
            put(bank, "d", 9)
        assert seeds_of(bank) == HELD
        other.execute("ROLLBACK")

        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ArtifactError, match="stays locked by another process"):
            bank.rows()


def test_a_change_that_readers_do_not_let_end_is_taken_back(bank, directory, monkeypatch):
    before = content_of(directory)
    monkeypatch.setattr(transactions, "_PATIENCE", 0.05)
    with registry(directory) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM adapters").fetchall()
        with pytest.raises(ArtifactError, match="stays locked by another process"):
            bank.compact()
        with pytest.raises(ArtifactError, match="stays locked by another process"):
            put(bank, "d", 9)

    assert content_of(directory) == before
