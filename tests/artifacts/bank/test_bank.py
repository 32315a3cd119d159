import shutil
import tempfile
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.bank import (
    BANK_FILE,
    DTYPES,
    REGISTRY_FILE,
    Bank,
    is_bank_file,
    transactions,
)
from propulsion_export.artifacts.bank import bank as module
from propulsion_export.artifacts.manifest import AdapterEntry
from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError

from . import HELD, STRIDE, WIDTH, check, content_of, numbers, put, row_of, seeds_of

# What comes back


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_comes_back_as_it_was_added(directory, dtype):
    base, added = numbers(0, dtype=dtype), numbers(1, dtype=dtype)
    told = AdapterEntry("sha256:1", "/über/\udcff", 7, labels=("nein", "ja ✓"))
    Bank.create(directory, base).add("zwölf 雪", added, told)

    opened = Bank.open(directory)

    row = row_of(opened, "zwölf 雪")
    assert (row.number, row.entry, row.file) == (1, told, BANK_FILE)
    assert (opened.width, opened.dtype, len(opened)) == (WIDTH, dtype, 1)
    assert opened.rows() == {"zwölf 雪": row}
    assert opened.values().dtype.name == dtype
    assert opened.values().tobytes() == base.tobytes() + added.tobytes()
    check(opened, "zwölf 雪")
    check(opened, BASE_NAME)


def test_rows_are_in_the_order_of_their_names(directory):
    made = Bank.create(directory, numbers(0))
    for seed, name in enumerate(["b", "é", "Z", "a", "雪"], 1):
        put(made, name, seed)

    assert list(made.rows()) == sorted(["b", "é", "Z", "a", "雪"])


def test_no_side_file_is_left_behind(bank, directory):
    assert sorted(content_of(directory)) == [directory / BANK_FILE, directory / REGISTRY_FILE]
    assert all(is_bank_file(str(path.relative_to(directory))) for path in content_of(directory))


def test_a_replacement_gets_a_row_of_its_own(bank):
    before, values = row_of(bank, "b"), bank.values()

    put(bank, "b", 9, replace=True)

    assert seeds_of(bank) == HELD | {"b": 9}
    assert row_of(bank, "b").number == 5
    np.testing.assert_array_equal(values[before.number], numbers(3))
    np.testing.assert_array_equal(bank.values()[before.number], numbers(3))


def test_the_row_of_a_removed_adapter_is_not_used_again(bank):
    bank.remove("c")

    assert put(bank, "d", 9).number == 5
    np.testing.assert_array_equal(bank.values()[4], numbers(4))


def test_the_last_adapter_can_be_removed(bank):
    for name in HELD:
        bank.remove(name)

    assert seeds_of(bank) == {}
    assert len(bank) == 0


def test_the_version_tells_of_changes_and_of_nothing_else(bank, directory):
    other = Bank.open(directory)
    seen = [bank.snapshot().version]
    for change in (
        lambda: put(other, "d", 9),
        lambda: put(other, "d", 10, replace=True),
        lambda: other.remove("d"),
        other.compact,
    ):
        change()
        seen.append(bank.snapshot().version)
    assert seen == sorted(set(seen))

    other.compact()
    other.rows()
    with pytest.raises(UsageError):
        put(other, "a", 9)
    assert bank.snapshot().version == seen[-1]


# What is refused


def test_a_name_that_is_there_is_refused_and_nothing_changes(bank, directory):
    before = content_of(directory)
    with pytest.raises(UsageError, match=r"has an adapter 'a' already\. .*--force"):
        put(bank, "a", 9)
    assert content_of(directory) == before


@pytest.mark.parametrize("name", [BASE_NAME, "", "a/b", "a\nb", ".hidden", "\udcff", "n" * 201])
def test_a_name_that_no_adapter_may_have_is_refused(bank, name):
    with pytest.raises(UsageError, match="cannot be called"):
        put(bank, name, 9)


def test_an_unknown_name_is_refused_with_some_that_are_known(bank):
    with pytest.raises(
        UnknownAdapterError, match=r"'x', expected one of base, a, b, c\. `prop.*add`"
    ):
        row_of(bank, "x")
    with pytest.raises(UsageError, match=r"no adapter 'x', expected one of a, b, c$"):
        bank.remove("x")
    with pytest.raises(UsageError, match="no adapter 'base'"):
        bank.remove(BASE_NAME)
    for seed in range(10, 17):
        put(bank, f"k{seed}", seed)
    with pytest.raises(UnknownAdapterError, match=r"base, a, b, c, k10, k11, k12, k13 and 3 more"):
        row_of(bank, "x")


def test_removing_from_an_empty_bank_says_that_it_is_empty(directory):
    with pytest.raises(UsageError, match="has no adapter 'a', it has none"):
        Bank.create(directory, numbers(0)).remove("a")


@pytest.mark.parametrize("left", [BANK_FILE, REGISTRY_FILE])
def test_a_bank_that_is_there_is_not_made_again(bank, directory, left):
    for file in content_of(directory):
        if file != directory / left:
            file.unlink()
    before = content_of(directory)
    with pytest.raises(UsageError, match="exists, expected a directory without a bank"):
        Bank.create(directory, numbers(1))
    assert content_of(directory) == before


@pytest.mark.parametrize("base", [numbers(0)[None], np.zeros(0, "float32"), np.zeros(3)])
def test_a_base_that_is_no_row_is_refused(directory, base):
    with pytest.raises(UsageError, match="expected"):
        Bank.create(directory, base)


# Chosen rows


def seeds_at(rows, values):
    """The seeds of rows, proved to be what the values hold at their numbers."""
    for row in rows:
        np.testing.assert_array_equal(values[row.number], numbers(row.entry.size))
    return [row.entry.size for row in rows]


def test_chosen_rows_are_in_the_order_of_their_names_with_the_values_of_them(bank, directory):
    rows, values = bank.choose(["c", BASE_NAME, "a", "c"])

    assert rows == [row_of(bank, name) for name in ("c", BASE_NAME, "a", "c")]
    assert seeds_at(rows, values) == [4, 0, 1, 4]
    assert isinstance(values, np.memmap)
    assert not values.flags.writeable
    assert values.shape == (5, WIDTH)
    assert values.filename == directory / BANK_FILE


def test_choosing_nobody_gives_the_values_alone(bank):
    rows, values = bank.choose([])

    assert rows == []
    np.testing.assert_array_equal(values, bank.values())


def test_all_unknown_names_are_told(bank):
    with pytest.raises(
        UnknownAdapterError, match=r"no adapter 'x'.*; .*no adapter 'é', expected one of"
    ) as told:
        bank.choose(["x", BASE_NAME, "é", "x", "b"])
    assert len(told.value.findings) == 2


@pytest.mark.parametrize("name", ["\udcff", "", "a/b"])
def test_a_name_that_no_adapter_may_have_is_an_unknown_one(bank, name):
    with pytest.raises(UnknownAdapterError, match="has no adapter"):
        bank.choose(["a", name])
    with pytest.raises(UnknownAdapterError, match="has no adapter"):
        bank.remove(name)


@pytest.fixture
def renumbered(bank, monkeypatch):
    """The bank; all rows of it get other numbers before each transaction that begins."""
    connect, other, busy = transactions._connect, Bank.open(bank.directory), []
    names = cycle(HELD)  # who moves to the end, so that everybody else moves up

    def connected(*arguments):
        if not busy:
            busy.append(True)
            name = next(names)
            put(other, name, HELD[name], replace=True)
            other.compact()
            busy.clear()
        return connect(*arguments)

    monkeypatch.setattr(transactions, "_connect", connected)
    return bank


def test_chosen_rows_and_values_are_of_one_moment(renumbered):
    for _ in range(3):
        rows, values = renumbered.choose(["a", "b", "c"])
        assert seeds_at(rows, values) == [1, 3, 4]


def test_rows_and_values_of_two_transactions_are_of_two_moments(renumbered):
    rows = renumbered.rows().values()
    values = renumbered.values()

    with pytest.raises(AssertionError):
        seeds_at(rows, values)


def test_a_compact_waits_while_the_values_of_chosen_rows_are_mapped(bank, monkeypatch):
    mapped, other = module.map_rows, Bank.open(bank.directory)
    monkeypatch.setattr(transactions, "_PATIENCE", 0.05)

    def compact_first(*arguments):
        with pytest.raises(ArtifactError, match="stays locked by another process"):
            other.compact()
        return mapped(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "map_rows", compact_first)
        rows, values = bank.choose(["c", "a"])

    assert seeds_at(rows, values) == [4, 1]
    other.compact()
    assert row_of(bank, "c").number == 3


# Against a dictionary


class Changes(RuleBasedStateMachine):
    """Whatever is done in whatever order, a bank is a dictionary whose old values can be read."""

    names = st.sampled_from(["a", "b", "é", "雪", "Z"])

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.bank = Bank.create(self.directory, numbers(0))
        self.model, self.next, self.held = {}, 1, []
        self.followed = self.bank.snapshot()

    def teardown(self):
        for values, kept in self.held:
            np.testing.assert_array_equal(values, kept)
        shutil.rmtree(self.directory)

    @rule(name=names, replace=st.booleans())
    def add(self, name, replace):
        if name in self.model and not replace:
            with pytest.raises(UsageError):
                put(self.bank, name, self.next)
            return
        put(self.bank, name, self.next, replace=replace)
        self.model[name] = self.next
        self.next += 1

    @rule(name=names)
    def remove(self, name):
        if name not in self.model:
            with pytest.raises(UsageError):
                self.bank.remove(name)
            return
        self.bank.remove(name)
        del self.model[name]

    @rule()
    def compact(self):
        self.bank.compact()
        assert self.bank.find_file().stat().st_size == STRIDE * (1 + len(self.model))

    @rule()
    def reopen(self):
        self.bank = Bank.open(self.directory)

    @rule()
    def follow(self):
        self.followed = self.bank.snapshot(self.followed)
        assert self.followed.rows == self.bank.rows()
        np.testing.assert_array_equal(self.followed.values, self.bank.values())

    @precondition(lambda self: len(self.held) < 5)
    @rule()
    def hold(self):
        values = self.bank.values()
        self.held.append((values, np.array(values)))

    @invariant()
    def is_the_model(self):
        assert seeds_of(self.bank) == self.model
        assert list(self.bank.rows()) == sorted(self.model)
        assert len(self.bank) == len(self.model)
        assert len(list((self.directory / "adapters").iterdir())) == 2


TestChanges = Changes.TestCase
TestChanges.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True
)


def test_a_copy_is_the_bank_of_that_moment_and_lives_on_its_own(bank, tmp_path):
    bank.remove("c")

    bank.copy(tmp_path / "copy")
    put(bank, "d", 9)

    copied = Bank.open(tmp_path / "copy")
    assert seeds_of(copied) == {name: seed for name, seed in HELD.items() if name != "c"}
    np.testing.assert_array_equal(copied.values(), bank.values()[:-1])
    put(copied, "e", 8)
    assert "e" not in seeds_of(bank)
