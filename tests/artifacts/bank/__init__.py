"""Banks of known numbers, and other processes that change them, for the bank's tests."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import ml_dtypes
import numpy as np
from sealed_registry import seal

from propulsion_export.artifacts.bank import BANK_FILE, REGISTRY_FILE, check_row
from propulsion_export.artifacts.manifest import AdapterEntry

WIDTH = 5
STRIDE = 4 * WIDTH
# What the fixture `bank` holds: the seed of each adapter.
HELD = {"a": 1, "b": 3, "c": 4}


def numbers(seed, width=WIDTH, dtype="float32"):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.random.default_rng(seed).standard_normal(width).astype(kind)


def entry(seed):
    """An entry that tells which numbers the row must hold."""
    return AdapterEntry(f"sha256:{seed:064x}", f"/adapters/{seed}", seed)


def put(bank, name, seed, **options):
    return bank.add(name, numbers(seed), entry(seed), **options)


def seeds_of(bank):
    """What the bank says, proved to be what its file holds: the seed of each adapter."""
    snapshot = bank.snapshot()
    np.testing.assert_array_equal(snapshot.values[0], numbers(0))
    for row in [snapshot.base, *snapshot.rows.values()]:
        check_row(row, snapshot.values)
        np.testing.assert_array_equal(snapshot.values[row.number], numbers(row.entry.size))
    return {name: row.entry.size for name, row in snapshot.rows.items()}


def row_of(bank, name):
    (row,), _ = bank.choose([name])
    return row


def check(bank, name):
    (row,), values = bank.choose([name])
    check_row(row, values)


def registry(directory):
    return closing(sqlite3.connect(directory / REGISTRY_FILE, isolation_level=None))


def content_of(directory):
    return {file: file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def fill(directory, adapters):
    """Put adapters into the registry behind the bank's back, which is faster."""
    with registry(directory) as db:
        db.execute("BEGIN")
        db.executemany(
            "INSERT INTO adapters VALUES (?, ?, ?, 'sha256:', ?)",
            (
                (f"n{n}", n, text, seal(f"n{n}", text, "sha256:"))
                for n in range(5, 5 + adapters)
                for text in [json.dumps({"digest": "", "source": "", "size": n})]
            ),
        )
        db.execute("UPDATE bank SET next_row = ?", (5 + adapters,))
        db.execute("COMMIT")
    os.truncate(directory / BANK_FILE, (5 + adapters) * STRIDE)


def half_committed(directory, copy):
    """A copy of the artifact as a process leaves it that is killed while it commits."""
    fill(directory, 1000)
    with registry(directory) as db:
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE adapters SET checksum = 'half'")  # too much for so small a cache
        shutil.copytree(directory, copy)
        db.execute("ROLLBACK")


# The parts that a script of another process shares with this one.
COMMON = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from propulsion_export.artifacts.bank import Bank, check_row
from propulsion_export.artifacts.manifest import AdapterEntry

def numbers(seed):
    return np.random.default_rng(seed).standard_normal(5).astype("float32")

def put(bank, name, seed, **options):
    entry = AdapterEntry(f"sha256:{seed:064x}", f"/adapters/{seed}", seed)
    return bank.add(name, numbers(seed), entry, **options)

def seeds_of(bank):
    snapshot = bank.snapshot()
    for row in [snapshot.base, *snapshot.rows.values()]:
        check_row(row, snapshot.values)
        assert np.array_equal(snapshot.values[row.number], numbers(row.entry.size)), row
    return {name: row.entry.size for name, row in snapshot.rows.items()}
"""


def start(script, *arguments):
    source = textwrap.dedent(COMMON + script)
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process):
    """The lines it printed, read as JSON."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]
