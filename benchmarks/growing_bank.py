"""The cost of adding an adapter to a bank that has few, and to one that has ten thousand.

    python benchmarks/growing_bank.py [--adapters 10000] [--width 20000]

Rows are as wide as all scales of a 22-million-parameter encoder. Prints the median time of an
addition around the 10th and around the last, every flush to the disk included, and their ratio;
the same for refreshing a snapshot after an addition, as a session does; how long the bank takes to
open; how much memory the opened bank adds to the process; and how long it takes to choose the
adapters of a batch.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.manifest import AdapterEntry

AROUND = 20  # additions that a median is taken over
BATCH = 8


def fill(bank: Bank, adapters: int) -> tuple[list[float], list[float]]:
    """Add adapters one by one; the seconds of each addition, and of the refresh after it."""
    chooser, snapshot = np.random.default_rng(0), bank.snapshot()
    adding, refreshing = [], []
    for number in range(adapters):
        row = chooser.uniform(0.9, 1.1, bank.width).astype(np.float32)
        entry = AdapterEntry(f"sha256:{number:064}", f"adapters/{number}", bank.width)
        started = time.perf_counter()
        bank.add(str(number), row, entry)
        added = time.perf_counter()
        snapshot = bank.snapshot(snapshot)
        refreshing.append(time.perf_counter() - added)
        adding.append(added - started)
    return adding, refreshing


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def early_and_late(seconds: list[float]) -> tuple[float, float]:
    """Medians around the 10th and the last, in milliseconds."""
    parts = seconds[10 - AROUND // 2 : 10 + AROUND // 2], seconds[-AROUND:]
    early, late = (statistics.median(part) * 1e3 for part in parts)
    return early, late


def resident() -> int:
    """Bytes of memory that the process holds and no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        bank = Bank.create(Path(directory), np.ones(options.width, np.float32))
        adding, refreshing = map(early_and_late, fill(bank, options.adapters))
        before = resident()
        opening = timed(lambda: Bank.open(Path(directory)).snapshot())
        values = Bank.open(Path(directory)).values()
        names = [str(number) for number in range(0, options.adapters, options.adapters // BATCH)]
        result = {
            "milliseconds to add one to 10": round(adding[0], 2),
            f"milliseconds to add one to {options.adapters:,}": round(adding[1], 2),
            "ratio": round(adding[1] / adding[0], 2),
            "milliseconds to refresh after them": [round(each, 2) for each in refreshing],
            "bytes of the bank": values.nbytes,
            "milliseconds to open it": round(opening * 1e3, 1),
            "bytes that this adds to the process": resident() - before,
            "milliseconds to choose a batch's adapters": round(
                statistics.median(timed(lambda: bank.choose(names)) for _ in range(AROUND)) * 1e3, 2
            ),
        }
    print(json.dumps(vars(options) | result, indent=2))


if __name__ == "__main__":
    main()
