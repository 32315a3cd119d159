import shutil

import pytest
from sealed_registry import seal

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.bank import (
    BANK_FILE,
    REGISTRY_FILE,
    Bank,
    is_bank_file,
    transactions,
)
from propulsion_export.errors import ArtifactError

from . import entry, fill, put, registry, row_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapters/bank.bin", True),
        ("adapters/bank-1.bin", True),
        ("adapters/bank-20.bin", True),
        ("adapters/registry.sqlite", True),
        ("adapters/registry.sqlite-journal", True),
        ("bank.bin", False),
        ("adapters/bank-0.bin", False),
        ("adapters/bank-x.bin", False),
        ("adapters/bank.bin.safetensors", False),
        ("adapters/deep/bank.bin", False),
        ("adapters/base.safetensors", False),
        ("adapters/registry.sqlite-wal", False),
    ],
)
def test_the_banks_files_are_told_from_others(name, expected):
    assert is_bank_file(name) is expected


# Damage


@pytest.mark.parametrize("missing", [BANK_FILE, REGISTRY_FILE])
def test_a_missing_file_is_named(bank, directory, missing):
    (directory / missing).unlink()
    with pytest.raises(ArtifactError, match=rf"{missing}: is missing.* Copy"):
        Bank.open(directory)
    assert not (directory / missing).exists()


@pytest.mark.parametrize("content", [b"", b"no registry", b"SQLite format 3\0" + bytes(4096)])
def test_a_registry_that_is_none_is_refused(bank, directory, content):
    (directory / REGISTRY_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"registry\.sqlite: .* (Copy|export again)"):
        Bank.open(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("PRAGMA user_version = 3", r"schema version is 3, expected 2\. Upgrade"),
        ("PRAGMA user_version = 0", r"schema version is 0, expected 2\. Copy"),
        ("DROP TABLE adapters", "is not the registry of a bank"),
        ("DELETE FROM bank", r"describes the bank as \[\]"),
        ("INSERT INTO bank SELECT * FROM bank", "expected its file, dtype"),
        ("UPDATE bank SET file = '../secret.bin'", "expected its file, dtype"),
        ("UPDATE bank SET file = 'adapters/bank-7.bin'", r"bank-7\.bin: is missing"),
        ("UPDATE bank SET dtype = 'float64'", "expected its file, dtype"),
        ("UPDATE bank SET width = 'five'", "expected its file, dtype"),
        ("UPDATE bank SET width = 0", "expected its file, dtype"),
        ("UPDATE bank SET next_row = 4", "names rows 1 to 4, expected rows from 1 to 3"),
        ("UPDATE adapters SET number = 0 WHERE name = 'b'", "names rows 0 to 4"),
        ("UPDATE bank SET next_row = 6", "expected 6 rows of 20 bytes"),
    ],
)
def test_a_registry_that_cannot_be_is_refused(bank, directory, damage, message):
    with registry(directory) as db:
        db.execute(damage)
    with pytest.raises(ArtifactError, match=message):
        Bank.open(directory)


@pytest.mark.parametrize("text", ["no json", "[]", '{"digest": 1, "unknown": 2}', "5"])
def test_an_entry_that_cannot_be_read_is_told_by_its_row(bank, directory, text):
    checksum = row_of(bank, "b").checksum
    with registry(directory) as db:
        sealed = "UPDATE adapters SET entry = ?, seal = ? WHERE name = 'b'"
        db.execute(sealed, (text, seal("b", text, checksum)))
    with pytest.raises(ArtifactError, match="the record of the adapter in row 3 is damaged"):
        bank.rows()
    assert row_of(bank, "a").entry == entry(1)


# How much work it is


CONSTANT = {
    "add": lambda bank: put(bank, "new", 9),
    "replace": lambda bank: put(bank, "b", 9, replace=True),
    "remove": lambda bank: bank.remove("c"),
    "choose": lambda bank: bank.choose(["c", BASE_NAME, "a", "c"]),
    "open": lambda bank: Bank.open(bank.directory),
    "values": Bank.values,
}


def work_of(monkeypatch, bank, use):
    """What SQLite is asked, and in how many of its steps it answers."""
    connect, asked, steps = transactions._connect, [], [0]

    def count():
        steps[0] += 1

    def watched(*arguments):
        db = connect(*arguments)
        db.set_trace_callback(asked.append)
        db.set_progress_handler(count, 1)
        return db

    with monkeypatch.context() as patch:
        patch.setattr(transactions, "_connect", watched)
        use(bank)
    return asked, steps[0]


@pytest.mark.parametrize("use", CONSTANT.values(), ids=CONSTANT)
def test_the_work_does_not_grow_with_the_adapters(bank, directory, monkeypatch, use):
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    fill(copy, 2000)

    _, few = work_of(monkeypatch, bank, use)
    asked, many = work_of(monkeypatch, Bank.open(copy), use)

    assert 0 < many <= 1.2 * few
    with registry(copy) as db:
        questions = [text for text in asked if text.startswith(("SELECT", "UPDATE", "DELETE"))]
        plans = [
            step for text in questions for *_, step in db.execute(f"EXPLAIN QUERY PLAN {text}")
        ]
    assert plans
    assert not [step for step in plans if "SCAN adapters" in step]


def test_following_an_addition_is_no_more_work_with_many_adapters(bank, directory, monkeypatch):
    def work(bank):
        before = bank.snapshot()
        put(bank, "new", 9)
        assert not bank.is_at(before)
        return work_of(monkeypatch, bank, lambda bank: bank.is_at(bank.snapshot(before)))[1]

    few = work(bank)
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    Bank.open(copy).remove("new")
    fill(copy, 2000)

    assert 0 < work(Bank.open(copy)) <= 1.2 * few


def test_another_bank_of_the_same_name_is_not_followed(bank, directory):
    before = bank.snapshot()
    other = directory.with_name("other")
    shutil.copytree(directory, other)
    put(Bank.open(other), "a", 9, replace=True)
    put(bank, "d", 8)
    followed = bank.snapshot(before)
    directory.rename(directory.with_name("gone"))
    other.rename(directory)

    assert not Bank.open(directory).is_at(followed)
    now = Bank.open(directory).snapshot(followed)

    assert now.rows == Bank.open(directory).rows()
    assert "d" not in now.rows


def test_work_that_grows_with_the_adapters_is_seen(bank, directory, monkeypatch):
    _, few = work_of(monkeypatch, bank, Bank.rows)
    fill(directory, 2000)
    _, many = work_of(monkeypatch, bank, Bank.rows)
    assert many > 100 * few


def test_a_row_number_that_is_none_is_refused(bank, directory):
    with registry(directory) as other:
        other.execute("UPDATE adapters SET number = 'x' WHERE name = 'b'")

    with pytest.raises(ArtifactError, match="names rows 1 to x, expected rows from 1 to 4"):
        Bank.open(directory)
