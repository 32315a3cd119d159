"""Directories that take long to fill: once in a run, for all of pytest's workers.

| fixture | gives |
|---|---|
| `shared` | `shared(name, fill)`: a directory, filled once by `fill(directory)` while other |
|  | workers that need it wait; copy what is in it before changing it |

PROPULSION_PREPARED names a directory to keep them in: `make serving` fills it with torch, and then
runs the tests that need no more than what is in it where there is no torch.
"""

import fcntl
import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    prepared = os.environ.get("PROPULSION_PREPARED")
    if prepared is not None:
        root = Path(prepared).resolve()
    elif "PYTEST_XDIST_WORKER" in os.environ:  # whose own directory is below that of the run
        root = root.parent
    (root / "shared").mkdir(parents=True, exist_ok=True)

    def make(name, fill):
        directory, complete = root / "shared" / name, root / "shared" / f"{name}.complete"
        with (root / "shared" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                if prepared is not None:
                    pytest.importorskip("torch", reason=f"{name} is not prepared")
                shutil.rmtree(directory, ignore_errors=True)  # what a failure left behind
                directory.mkdir()
                fill(directory)
                complete.touch()
        return directory

    return make
