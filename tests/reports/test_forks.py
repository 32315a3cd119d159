"""A process that serves becomes two: a fork keeps no lock, and waits for none, however idle.

What a server does that loads its model first and forks workers then, such as gunicorn with
`--preload`, is done here with `os.fork`; gunicorn itself was not run.
"""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts import changing, locking
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank, transactions
from propulsion_export.environment import quiet
from propulsion_export.environment.forking import no_fork
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.runners.opening import open_runner
from propulsion_export.serving.session import Session

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning",  # what these tests are about
)

KINDS = ("switchable", "banked")
IDS = np.array([[5, 6, 7, 8]])
INPUTS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
SECONDS = 20  # more than anything here takes, less than the patience of a lock


@pytest.fixture
def copied(switchable, banked, tmp_path):
    """`copied(kind)`: a copy that the test may change."""
    places = {"switchable": switchable, "banked": banked}
    return lambda kind: shutil.copytree(places[kind], tmp_path / kind)


@contextmanager
def idle_fork():
    """A child that does nothing until the block ends."""
    child = os.fork()
    if child == 0:
        time.sleep(3 * SECONDS)
        os._exit(0)
    try:
        yield child
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child has ended too early"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def in_fork(work):
    """What a forked process exits with after `work()`: 0, or 1 if it raised; fails if it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"in the fork: {error!r}\n".encode())
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the fork hangs")


@contextmanager
def holding(enter):
    """Another thread that is inside the context manager that `enter()` returns."""
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with enter():
            inside.set()
            leave.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(SECONDS)
    try:
        yield
    finally:
        leave.set()
        thread.join()


ADD = "import sys; from propulsion_export.cli import main; main(['adapter', 'add', *sys.argv[1:]])"


SHOW_OPEN = """
import os
for number in range(3, 64):
    try:
        print(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:
        pass
"""


# The lock of an artifact


@pytest.mark.parametrize("kind", KINDS)
def test_an_idle_fork_made_while_a_thread_adds_blocks_nobody(kind, copied, world, monkeypatch):
    directory = copied(kind)
    session = Session(directory)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(SECONDS)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as threads:
        patch.setattr(changing, "check_tokenizer", wait)
        adding = threads.submit(session.add, f"new={world.three}")
        assert inside.wait(SECONDS)
        with idle_fork():
            go_on.set()
            adding.result(SECONDS)
            began = time.monotonic()
            session.add(f"newer={world.five}")
            assert time.monotonic() - began < 5
            words = [sys.executable, "-c", ADD, directory, f"newest={world.five}"]
            subprocess.run(words, check=True, timeout=SECONDS, capture_output=True)

    session.refresh()
    assert session.adapters == ("five", "new", "newer", "newest", "three")


def test_a_fork_made_while_the_lock_is_opened_does_not_keep_it(copied, world, monkeypatch):
    directory = copied("switchable")
    monkeypatch.setattr(locking, "_PATIENCE", 2.0)
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        _lock_and_fork(directory, writing)
    os.close(writing)
    os.waitpid(owner, 0)

    try:
        changing.add_adapter(directory, f"new={world.three}")  # the owner is gone, its fork is not
    finally:
        os.kill(int(os.read(reading, 20)), signal.SIGKILL)
        os.close(reading)

    assert "new" in Artifact.read(directory).list_adapters()


def _lock_and_fork(directory, writing):
    """Be killed with the lock held, and leave a fork made between opening and locking."""
    opened, forked, locked = threading.Event(), threading.Event(), threading.Event()
    real = os.open

    def slow(*arguments, **options):
        descriptor = real(*arguments, **options)
        opened.set()
        forked.wait(0.5)
        return descriptor

    def hold():
        with locking.exclusive_lock(directory):
            locked.set()
            time.sleep(SECONDS)

    os.open = slow
    threading.Thread(target=hold, daemon=True).start()
    opened.wait(SECONDS)
    if (child := os.fork()) == 0:
        time.sleep(3 * SECONDS)
        os._exit(0)
    forked.set()
    os.write(writing, str(child).encode())
    locked.wait(SECONDS)
    os._exit(0)


def test_a_program_that_is_started_meanwhile_gets_no_lock(copied):
    directory = copied("switchable")
    words = [sys.executable, "-c", SHOW_OPEN]
    options = {"close_fds": False, "check": True, "capture_output": True, "text": True}

    with locking.exclusive_lock(directory):
        started = subprocess.run(words, **options)
    descriptor = os.open(directory, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    twin = subprocess.run(words, **options)
    os.close(descriptor)

    assert str(directory) in twin.stdout
    assert str(directory) not in started.stdout


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
if sys.argv[2] == "fork" and os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["itself", "fork"])
def test_a_lock_that_stays_names_the_process_that_holds_it(how, copied, monkeypatch):
    directory = copied("switchable")
    monkeypatch.setattr(locking, "_PATIENCE", 0.1)
    words = [sys.executable, "-c", HOLD, directory, how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        process = int(holder.stdout.readline())
        try:
            with pytest.raises(ArtifactError) as caught, locking.exclusive_lock(directory):
                pass
        finally:
            os.kill(process, signal.SIGKILL)

    message = str(caught.value)
    assert f"stays locked for 0 s by process {process} ({sys.executable[:40]}" in message
    assert "\n" not in message


def test_a_thread_that_holds_the_lock_is_named_as_that(copied, monkeypatch):
    directory = copied("switchable")
    monkeypatch.setattr(locking, "_PATIENCE", 0.1)
    with (
        holding(partial(locking.exclusive_lock, directory)),
        pytest.raises(ArtifactError, match="stays locked for 0 s by another thread of this proc"),
        locking.exclusive_lock(directory),
    ):
        pass


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


def test_the_twin_of_all_these_holds_a_lock(copied):
    """A lock that a living process holds is not free, or the tests above would show nothing."""
    directory = copied("switchable")
    with locking.exclusive_lock(directory):
        descriptor = os.open(directory, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
