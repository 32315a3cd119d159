"""The memory that a session takes while requests of many shapes come.

    python benchmarks/random_shapes.py ARTIFACT [--requests 3000] [--rows 32] [--tokens 128]

Each request has a random number of rows and tokens. ONNX Runtime keeps the memory of the largest
request for the next one. Prints the memory that no file backs after the session was opened, after a
request of the largest shape, and after each sixth of the requests, and the ratio of the last to
that of the largest shape alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from propulsion_export import Session


def resident() -> int:
    """Bytes of memory that the process holds and no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=3_000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    session, chooser = Session(options.artifact), np.random.default_rng(0)

    def ask(rows: int, tokens: int) -> int:
        ids = chooser.integers(5, 1_000, (rows, tokens))
        session({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        return resident()

    opened = resident()
    largest = ask(options.rows, options.tokens)
    later = []
    for number in range(1, options.requests + 1):
        rows, tokens = chooser.integers(1, (options.rows + 1, options.tokens + 1))
        now = ask(int(rows), int(tokens))
        if number % max(options.requests // 6, 1) == 0:
            later.append(now)
    result = {
        "MB after opening": round(opened / 1e6),
        "MB after the largest shape": round(largest / 1e6),
        "MB after each sixth of the requests": [round(each / 1e6) for each in later],
        "ratio of the last to the largest shape": round(later[-1] / largest, 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
