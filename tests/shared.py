"""Directories that take long to fill: once in a run, for all of pytest's workers.

| fixture | gives |
|---|---|
| `shared` | `shared(name, fill)`: a directory, filled once by `fill(directory)` while other |
|  | workers that need it wait; copy what is in it before changing it |
"""

import fcntl
import os
import shutil

import pytest


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose own directory is below that of the run
        root = root.parent
    (root / "shared").mkdir(exist_ok=True)

    def make(name, fill):
        directory, complete = root / "shared" / name, root / "shared" / f"{name}.complete"
        with (root / "shared" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(directory, ignore_errors=True)  # what a failure left behind
                directory.mkdir()
                fill(directory)
                complete.touch()
        return directory

    return make
