"""Processes that are killed at any moment, or change and read a bank at once."""

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from propulsion_export.artifacts.bank import REGISTRY_FILE, Bank, transactions

from . import HELD, STRIDE, half_committed, numbers, output_of, put, seeds_of, start

# Kills a change before each line of the bank's modules that it runs, or after each byte of a row it
# writes, and prints what the bank holds then, and after one more adapter.
AT_EVERY_STEP = """
from propulsion_export.artifacts import bank as package

own = str(Path(package.__file__).parent)
change = {
    "add": lambda bank: put(bank, "d", 9),
    "replace": lambda bank: put(bank, "b", 9, replace=True),
    "remove": lambda bank: bank.remove("b"),
    "compact": lambda bank: bank.compact(),
}[sys.argv[2]]
whole = os.pwrite

def die_before_line(step):
    left = [step]
    def trace(frame, event, argument):
        if os.path.dirname(frame.f_code.co_filename) != own:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
        return trace
    sys.settrace(trace)

def die_after_byte(step):
    def pwrite(descriptor, data, offset):
        if step > len(data):
            return whole(descriptor, data, offset)
        whole(descriptor, data[:step], offset)
        os._exit(9)
    os.pwrite = pwrite

die = {"line": die_before_line, "byte": die_after_byte}[sys.argv[3]]
for step in range(1000):
    directory = Path(sys.argv[1]) / str(step)
    shutil.copytree(Path(sys.argv[1]) / "artifact", directory)
    child = os.fork()
    if not child:
        bank = Bank.open(directory)
        die(step)
        change(bank)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), code
    found = seeds_of(Bank.open(directory))
    put(Bank.open(directory), "next", 11)
    after = seeds_of(Bank.open(directory))
    assert len(list((directory / "adapters").iterdir())) == 2
    shutil.rmtree(directory)
    print(json.dumps([found, after]))
    if code == 0:
        break
"""

# Many processes one after the other that change a bank and are killed somewhere.
AT_RANDOM = """
directory, chance = Path(sys.argv[1]), random.Random(5)
bank = Bank.create(directory, numbers(0))
seed = 0
for turn in range(int(sys.argv[2])):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        own = Bank.open(directory)
        for seed in range(seed + 1, seed + 1000):
            name = f"k{seed % 7}"
            put(own, name, seed, replace=True)
            os.write(writing, b".")
            if seed % 5 == 0:
                own.remove(name)
            if seed % 6 == 0:
                own.compact()
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    time.sleep(chance.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    seed += 1 + len(os.read(reading, 1 << 16))
    os.close(reading)
    seeds_of(Bank.open(directory))
    seed += 2
    put(Bank.open(directory), f"next{turn}", seed)
    assert seeds_of(Bank.open(directory))[f"next{turn}"] == seed
    assert len(list((directory / "adapters").iterdir())) == 2
print(json.dumps([bank.snapshot().version, seeds_of(bank)]))
"""

# Adds half a hundred adapters as fast as it can.
MANY = """
bank = Bank.open(Path(sys.argv[1]))
for number in range(50):
    put(bank, f"{sys.argv[2]}{number}", 1 + number)
"""


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ("add", HELD | {"d": 9}),
        ("replace", HELD | {"b": 9}),
        ("remove", {"a": 1, "c": 4}),
        ("compact", HELD),
    ],
)
def test_a_kill_before_any_line_leaves_the_old_or_the_new_bank(bank, tmp_path, change, new):
    found = output_of(start(AT_EVERY_STEP, tmp_path, change, "line"))

    states = [state for state, _ in found]
    switched = states.index(new)
    assert states == [HELD] * switched + [new] * (len(states) - switched)
    assert all(after == state | {"next": 11} for state, after in found)
    assert len(states) > 20
    assert states[0] == HELD
    assert states[-1] == new


@pytest.mark.parametrize("change", ["add", "compact"])
def test_a_kill_after_any_byte_of_a_row_leaves_the_old_bank(bank, tmp_path, change):
    found = output_of(start(AT_EVERY_STEP, tmp_path, change, "byte"))

    new = HELD | ({"d": 9} if change == "add" else {})
    assert [state for state, _ in found] == [HELD] * (STRIDE + 1) + [new]
    assert all(after == state | {"next": 11} for state, after in found)


def test_processes_that_are_killed_anywhere_leave_a_whole_bank(directory):
    ((version, seeds),) = output_of(start(AT_RANDOM, directory, 60))

    assert sum(name.startswith("next") for name in seeds) == 60
    assert version > 120  # the killed ones did change something


def test_two_processes_that_add_at_once_add_all(bank, directory):
    for process in [start(MANY, directory, "x"), start(MANY, directory, "y")]:
        assert output_of(process) == []

    expected = {f"{who}{number}": 1 + number for who in "xy" for number in range(50)}
    assert seeds_of(Bank.open(directory)) == HELD | expected
    assert sorted(row.number for row in bank.rows().values())[-1] == 104


def replace_and_compact(bank, name):
    for number in range(8):
        put(bank, name, 10 + number, replace=True)
        if number % 3 == 0:
            bank.compact()


def read_often(bank):
    for _ in range(30):
        snapshot = bank.snapshot()
        assert snapshot.rows.keys() >= HELD.keys()
        for row in snapshot.rows.values():
            np.testing.assert_array_equal(snapshot.values[row.number], numbers(row.entry.size))


def test_threads_see_the_old_or_the_new_bank(bank):
    with ThreadPoolExecutor() as threads:
        done = [threads.submit(replace_and_compact, bank, name) for name in "xyz"]
        done += [threads.submit(read_often, bank) for _ in range(2)]
    for each in done:
        each.result()

    assert seeds_of(bank) == HELD | dict.fromkeys("xyz", 17)


@pytest.mark.parametrize(
    ("change", "synced"),
    [
        (lambda bank: put(bank, "d", 9), ["bank.bin"]),
        (Bank.compact, ["bank-1.bin", "adapters"]),
    ],
    ids=["add", "compact"],
)
def test_rows_are_on_the_disk_before_the_registry_names_them(bank, change, synced, monkeypatch):
    # A loss of power cannot be had in a test: what is written must be flushed by then.
    connect, seen, sync, write = transactions._connect, [], os.fsync, os.pwrite

    def watched(*arguments):
        db = connect(*arguments)
        db.set_trace_callback(lambda text: seen.append(text.split()[0]))
        return db

    def fsync(descriptor):
        sync(descriptor)
        places = [bank.directory / "adapters", *(bank.directory / "adapters").iterdir()]
        seen.extend(p.name for p in places if os.path.samestat(p.stat(), os.fstat(descriptor)))

    def pwrite(*arguments):
        seen.append("written")
        return write(*arguments)

    monkeypatch.setattr(transactions, "_connect", watched)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "pwrite", pwrite)

    change(bank)

    end = len(seen) - 1 - seen[::-1].index("written")
    assert seen[end + 1 : end + 1 + len(synced)] == synced
    assert seen.count("COMMIT") == 1
    assert seen.index("COMMIT") > end


def test_what_a_process_had_begun_to_commit_is_taken_back_by_readers(bank, directory, tmp_path):
    copy = tmp_path / "copy"
    half_committed(directory, copy)
    expected = bank.rows()
    journal = copy / f"{REGISTRY_FILE}-journal"
    assert journal.stat().st_size > 0
    with closing(
        sqlite3.connect(f"{(copy / REGISTRY_FILE).as_uri()}?immutable=1", uri=True)
    ) as half:
        changed = "SELECT count(*) FROM adapters WHERE checksum = 'half'"
        assert half.execute(changed).fetchone()[0] > 500

    opened = Bank.open(copy)

    assert opened.rows() == expected
    assert not journal.exists()
