"""A process that serves becomes two: a fork waits for no lock, and opens its own.

What a server does that loads its model first and forks workers then is done here with `os.fork`, so
that threads can hold what they hold at that moment; `test_gunicorn` runs a real one.
"""

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
from forks import IDS, INPUTS, KINDS, SECONDS, forking, holding, in_fork

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts import changing
from propulsion_export.artifacts.bank import Bank, transactions
from propulsion_export.environment import quiet
from propulsion_export.environment.forking import no_fork
from propulsion_export.errors import UsageError
from propulsion_export.runners.opening import open_runner
from propulsion_export.serving.session import Session

pytestmark = forking


# What a child inherits


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_waits_for_no_lock_of_a_session(kind, copied, world):
    session = Session(copied(kind))
    session("ba be", "three")
    calls = [
        partial(session, "ba be", "three"),
        partial(session.add, f"new={world.three}"),
        partial(session.remove, "three"),
        session.refresh,
        partial(session, "ba be", "nobody"),
    ]

    def refused():
        for call in calls:
            with pytest.raises(UsageError, match="Open a session in each process"):
                call()
        assert session.adapters == ("five", "three")
        assert "2 adapters" in repr(session)

    text, weights = session._model._text, session._weights
    locks = (session._refreshing, session._following, text.one_at_a_time, weights._checking)
    with ExitStack() as held:
        for lock in locks:
            held.enter_context(holding(lambda lock=lock: lock))
        assert in_fork(refused) == 0
    assert session.adapters == ("five", "three")


def test_a_runner_is_refused_in_a_fork(folded):
    runner, inputs = open_runner(folded), {**INPUTS, "token_type_ids": 0 * IDS}

    def refused():
        with pytest.raises(UsageError, match="the runner was opened before this process was fork"):
            runner(inputs)

    runner(inputs)
    assert in_fork(refused) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_opens_its_own_session_whatever_threads_hold(kind, copied, world):
    directory = copied(kind)
    session = Session(directory)
    [expected] = session("ba be", "three")

    def answer():
        own = Session(directory)
        [reply] = own("ba be", "three")
        assert reply.prediction == expected.prediction
        own.add(f"new={world.five}")

    with holding(quiet.quiet):
        assert in_fork(answer) == 0
    session.refresh()
    assert "new" in session.adapters


def test_a_fork_computes_what_a_thread_was_computing(world, monkeypatch):
    """`functools.cached_property` of Python 3.11 has one lock for all instances."""
    inside, leave = threading.Event(), threading.Event()
    adapter, other = Adapter.read(world.three), Adapter.read(world.five)
    real = Adapter.digest.func

    def slow(one):
        if one is adapter:
            inside.set()
            leave.wait(SECONDS)
        return real(one)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as threads:
        patch.setattr(Adapter.digest, "func", slow)
        digest = threads.submit(lambda: adapter.digest)
        assert inside.wait(SECONDS)
        try:
            assert in_fork(lambda: other.digest) == 0
        finally:
            leave.set()
        assert digest.result(SECONDS) == adapter.digest


def test_a_fork_prints_although_a_thread_had_silenced_libraries(monkeypatch):
    def speak():
        with quiet.quiet():
            print("not heard")
        print("heard", flush=True)

    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "__stdout__", pipe)
        with holding(quiet.quiet):
            assert in_fork(speak) == 0
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "heard\n"


# SQLite, whose memory of a thread's locks a fork would take for its own


@pytest.mark.parametrize("transaction", [transactions.reading, transactions.changing])
def test_a_fork_made_during_a_transaction_uses_the_bank(transaction, copied, world, monkeypatch):
    directory = copied("banked")
    monkeypatch.setattr(transactions, "_PATIENCE", 3.0)
    inside = threading.Event()

    def hold():
        with transaction(directory):
            inside.set()
            time.sleep(0.5)

    def use():
        changing.add_adapter(directory, f"new={world.three}")
        assert len(Bank.open(directory)) == 3

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(SECONDS)
    assert in_fork(use) == 0
    thread.join()
    assert sorted(Bank.open(directory).rows()) == ["five", "new", "three"]


def test_forks_are_made_between_the_changes_of_busy_threads(copied, world):
    directory = copied("banked")
    done, errors = threading.Event(), []

    def change(name):
        try:
            while not done.is_set():
                changing.add_adapter(directory, f"{name}={world.three}", force=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=change, args=[name]) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    codes = [in_fork(lambda: Bank.open(directory).rows()) for _ in range(10)]
    done.set()
    for thread in threads:
        thread.join(SECONDS)

    assert (codes, errors) == ([0] * 10, [])


def test_a_thread_forks_inside_what_keeps_others_from_forking():
    def again():
        with no_fork():
            pass

    with no_fork(), no_fork():
        assert in_fork(again) == 0


# Whole servers


PRELOADED = """
import gc, os, signal, sys, threading, time
import numpy as np
from propulsion_export import Session
from propulsion_export.errors import UsageError

directory, adapter = sys.argv[1:]
session = Session(directory)
ids = np.array([[5, 6, 7, 8]] * 8)
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
expected = [reply.outputs["logits"].tolist() for reply in session(inputs, "three")]
done = threading.Event()

def ask():
    while not done.is_set():
        session(inputs, "three")

def change():
    while not done.is_set():
        session.add(f"new={adapter}", force=True)

def work(number):
    global session
    for call in (lambda: session(inputs), lambda: session.add(adapter), session.refresh):
        try:
            call()
        except UsageError:
            continue
        sys.exit("was not refused")
    own = Session(directory)
    found = [reply.outputs["logits"].tolist() for reply in own(inputs, "three")]
    if found != expected:
        sys.exit("another answer")
    if number % 2:
        del session
        gc.collect()
    del own
    gc.collect()

threads = [threading.Thread(target=each) for each in (ask, ask, change)]
for thread in threads:
    thread.start()
workers = []
for number in range(6):
    worker = os.fork()
    if worker == 0:
        signal.alarm(30)  # kills what hangs
        work(number)
        sys.exit(0)  # as a worker of gunicorn ends, with all that Python does at its end
    workers.append(worker)
codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
done.set()
for thread in threads:
    thread.join()
session(inputs, "three")
print(codes)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_a_server_that_has_loaded_the_model_work_and_end(kind, copied, world):
    words = [sys.executable, "-W", "error", "-W", "ignore:This process", "-c", PRELOADED]
    done = subprocess.run(
        [*words, copied(kind), world.five],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert (done.stdout, done.returncode) == ("[0, 0, 0, 0, 0, 0]\n", 0), done.stderr


ENDING = """
import atexit, os, signal, sys
from propulsion_export import Session

session = Session(sys.argv[1])
child = os.fork()
if child == 0:
    signal.alarm(30)
    atexit.register(print, "Python's own handler")
    print("buffered")
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_ends_with_its_own_code_and_output(switchable):
    """`import onnxruntime`, a fork and its end hang by themselves (ONNX Runtime 1.32)."""
    words = [sys.executable, "-W", "error", "-W", "ignore:This process", "-c", ENDING, switchable]

    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)

    assert (done.stdout, done.stderr) == ("buffered\nPython's own handler\n7\n", "")


class Rows:
    """A data set whose items are answers of a session of the worker's own."""

    def __init__(self, session, directory):
        self.session, self.directory, self.own = session, directory, None

    def __len__(self):
        return 8

    def __getitem__(self, number):
        with pytest.raises(UsageError, match="Open a session in each process"):
            self.session(INPUTS, "three")
        self.own = self.own or Session(self.directory)
        return self.own(INPUTS, "three")[0].outputs["logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_a_data_loader_open_their_own_and_block_nobody(kind, copied, world):
    from torch.utils.data import DataLoader

    directory = copied(kind)
    session = Session(directory)
    expected = session(INPUTS, "three")[0].outputs["logits"]
    loader = DataLoader(
        Rows(session, directory),
        num_workers=2,
        batch_size=None,
        multiprocessing_context="fork",
        persistent_workers=True,
        timeout=SECONDS,
    )
    answers = iter(loader)
    first = next(answers)
    began = time.monotonic()
    session.add(f"new={world.five}")  # the workers are there, idle or not
    taken = time.monotonic() - began
    found = [first, *answers]
    del answers, loader
    gc.collect()

    assert taken < 5
    assert len(found) == 8
    for answer in found:
        np.testing.assert_array_equal(answer, expected)
