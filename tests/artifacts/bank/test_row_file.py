import os

import numpy as np
import pytest

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.bank import BANK_FILE, Bank
from propulsion_export.errors import ArtifactError, UsageError

from . import HELD, STRIDE, WIDTH, check, content_of, entry, numbers, put, seeds_of


def test_the_file_is_nothing_but_rows(bank):
    expected = b"".join(numbers(seed).tobytes() for seed in range(5))
    assert bank.find_file().read_bytes() == expected


def test_values_are_the_file_itself_and_cannot_be_written(bank):
    values = bank.values()
    assert isinstance(values, np.memmap)
    assert values.shape == (5, WIDTH)
    assert not values.flags.writeable

    with bank.find_file().open("r+b") as file:
        file.write(numbers(77).tobytes())

    np.testing.assert_array_equal(values[0], numbers(77))


def test_values_outlive_changes_of_others(bank, directory):
    values = bank.values()
    kept = np.array(values)

    put(Bank.open(directory), "d", 9)
    np.testing.assert_array_equal(values, kept)
    Bank.open(directory).compact()

    np.testing.assert_array_equal(values, kept)
    assert bank.values().shape == (5, WIDTH)
    assert seeds_of(bank) == HELD | {"d": 9}


@pytest.mark.parametrize(
    "values", [numbers(9, WIDTH + 1), numbers(9, dtype="float16"), numbers(9)[None]]
)
def test_values_that_are_no_row_are_refused(bank, values):
    with pytest.raises(UsageError, match=r"expected \[5\] of float32"):
        bank.add("d", values, entry(9))
    assert seeds_of(bank) == HELD


def test_values_in_another_order_of_bytes_are_the_same_numbers(bank):
    bank.add("d", numbers(9).astype(">f4"), entry(9))
    assert seeds_of(bank)["d"] == 9


# Compacting


def test_compact_gives_back_the_rows_that_nobody_has(bank, directory):
    bank.compact()

    assert bank.find_file() == directory / "adapters/bank-1.bin"
    assert bank.find_file().read_bytes() == b"".join(numbers(n).tobytes() for n in (0, 1, 3, 4))
    assert not (directory / BANK_FILE).exists()
    assert seeds_of(Bank.open(directory)) == HELD

    bank.remove("a")
    bank.compact()
    assert bank.find_file() == directory / "adapters/bank-2.bin"
    names = {path.name for path in (directory / "adapters").iterdir()}
    assert names == {"bank-2.bin", "registry.sqlite"}


def test_compact_does_nothing_when_there_is_nothing_to_give_back(bank, directory):
    bank.compact()
    before = content_of(directory)

    bank.compact()

    assert content_of(directory) == before


def test_compact_keeps_the_rights_of_the_file(bank):
    bank.find_file().chmod(0o640)
    bank.compact()
    assert bank.find_file().stat().st_mode & 0o777 == 0o640


# Damage


def test_a_flipped_byte_is_found_in_its_row_alone(bank):
    content = bytearray(bank.find_file().read_bytes())
    content[3 * STRIDE + 2] ^= 1
    bank.find_file().write_bytes(content)

    with pytest.raises(ArtifactError, match=r"bank\.bin: row 3 is sha256:.*, expected sha256:"):
        check(bank, "b")
    for name in (BASE_NAME, "a", "c"):
        check(bank, name)


@pytest.mark.parametrize(
    "use", [Bank.values, Bank.snapshot, lambda bank: put(bank, "d", 9), Bank.compact]
)
def test_a_bank_file_that_lacks_a_byte_is_refused(bank, directory, use):
    os.truncate(bank.find_file(), 5 * STRIDE - 1)
    short = r"bank\.bin: has 99 bytes, expected 5 rows of 20 bytes"

    with pytest.raises(ArtifactError, match=short):
        Bank.open(directory)
    with pytest.raises(ArtifactError, match=short):
        use(bank)


def test_adding_reads_no_row(bank, monkeypatch):
    def reads(*arguments, **named):
        raise AssertionError(arguments)

    monkeypatch.setattr(os, "pread", reads)
    monkeypatch.setattr(np, "memmap", reads)
    put(bank, "d", 9)
    Bank.open(bank.directory)
    with pytest.raises(AssertionError):
        check(bank, "d")
