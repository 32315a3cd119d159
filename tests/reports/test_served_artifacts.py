"""What happens to an artifact while it is served: forks, links, replacement, requests of any shape.

Whoever asks gets the answer that the version in the reply computes, or is told in words why not.
"""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from forks import forking

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts import locking
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.serving.session import Session

KINDS = ("switchable", "banked")


# Forks


@forking
def test_a_fork_made_while_an_adapter_is_added_keeps_no_lock(copied, world, monkeypatch):
    directory = copied("switchable")
    monkeypatch.setattr(locking, "_PATIENCE", 2.0)
    with locking.exclusive_lock(directory):
        child = os.fork()
        if child == 0:
            threading.Event().wait(60)
            os._exit(0)

    try:
        add_adapter(directory, f"new={world.three}")  # the child is still there
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)

    assert sorted(Artifact.read(directory).list_adapters()) == ["five", "new", "three"]


@forking
def test_the_lock_outlives_neither_its_owner_nor_a_fork_of_it(copied, world, monkeypatch):
    directory = copied("switchable")
    monkeypatch.setattr(locking, "_PATIENCE", 2.0)
    owner = os.fork()
    if owner == 0:
        with locking.exclusive_lock(directory):
            if os.fork() == 0:
                threading.Event().wait(3)
                os._exit(0)
            os._exit(0)  # as if killed: nothing is released
    os.waitpid(owner, 0)

    add_adapter(directory, f"new={world.three}")

    assert "new" in Artifact.read(directory).list_adapters()


def test_a_lock_that_is_held_is_still_waited_for(copied, world, monkeypatch):
    """The twin of the two tests above: a release that comes too early would be noticed."""
    directory = copied("switchable")
    monkeypatch.setattr(locking, "_PATIENCE", 0.1)
    with (
        locking.exclusive_lock(directory),
        pytest.raises(ArtifactError, match="stays locked for 0 s by"),
    ):
        add_adapter(directory, f"new={world.three}")


@forking
@pytest.mark.parametrize("change", ["add", "remove", "refresh"])
def test_a_fork_changes_nothing_with_its_parents_session(change, copied, world):
    session = Session(copied("banked"))
    arguments = {"add": [f"new={world.three}"], "remove": ["three"], "refresh": []}[change]
    with session._following:  # as another thread may hold it at the moment of the fork
        child = os.fork()
        if child == 0:
            try:
                getattr(session, change)(*arguments)
            except UsageError as error:
                os._exit(7 if "Open a session in each process" in str(error) else 1)
            os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert session.adapters == ("five", "three")


# Processes

ASKING = """
import json, sys
import numpy as np
from propulsion_export import Session

session = Session(sys.argv[1])
ids = np.array([[5, 6, 7, 8]])
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
print("open", flush=True)
found = []
for _ in range(150):
    session.refresh()
    [reply] = session(inputs, "x")
    found.append([reply.version, reply.outputs["logits"].tolist()])
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_four_processes_ask_for_an_adapter_while_it_is_replaced(kind, copied, world):
    directory = copied(kind)
    contents = {Adapter.read(content).digest: content for content in (world.three, world.five)}
    add_adapter(directory, f"x={world.three}")
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", ASKING, str(directory)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in asking:
        assert process.stdout.readline() == "open\n"

    replaced = 0
    while any(process.poll() is None for process in asking) and replaced < 400:
        add_adapter(directory, f"x={list(contents.values())[replaced % 2]}", force=True)
        replaced += 1
    answers = [tuple(map(json.dumps, each)) for p in asking for each in json.loads(p.stdout.read())]
    for process in asking:
        assert process.wait(60) == 0
        process.stdout.close()

    own = Session(directory)
    ids = np.array([[5, 6, 7, 8]])
    for name, digest in zip(("three", "five"), contents, strict=True):
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        [reply] = own(inputs, name)
        right = json.dumps(reply.outputs["logits"].tolist())
        got = {logits for version, logits in answers if version == json.dumps(digest)}
        assert got == {right}
    assert {version for version, _ in answers} == {json.dumps(digest) for digest in contents}
    assert len(answers) == 600


# Shapes


def owned():
    """Bytes of memory of this process alone."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shapes(banked):
    session, chooser, memory = Session(banked), np.random.default_rng(0), []
    for request in range(3_000):
        shape = chooser.integers(1, 33), chooser.integers(1, 41)  # as many positions as there are
        ids = chooser.integers(5, 99, shape)
        session({"input_ids": ids, "attention_mask": np.ones_like(ids)}, "three")
        if request % 250 == 249:
            memory.append(owned())

    print([round(each / 2**20) for each in memory])  # shown with -s
    assert max(memory[4:]) - memory[3] < 8 * 2**20, memory
