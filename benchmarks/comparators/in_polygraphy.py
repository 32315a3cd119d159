"""Turn inputs and PyTorch's outputs into Polygraphy's files; runs in Polygraphy's environment.

    python in_polygraphy.py RUNS INPUTS OUTPUTS

RUNS is a directory of pairs `N.inputs.npz` and `N.outputs.npz`. Written as Polygraphy's example
"comparing with custom output data" does it, for `--load-inputs` and `--load-outputs`.
"""

import sys
from pathlib import Path

import numpy as np
from polygraphy.comparator import RunResults
from polygraphy.json import save_json


def main() -> None:
    runs, inputs, outputs = map(Path, sys.argv[1:])
    count = len(list(runs.glob("*.inputs.npz")))
    feeds, found = ([read(runs / f"{n}.{part}.npz") for n in range(count)] for part in PARTS)
    save_json(feeds, str(inputs))
    results = RunResults()
    results.add(found, runner_name="PyTorch")
    results.save(str(outputs))


PARTS = ("inputs", "outputs")


def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    main()
