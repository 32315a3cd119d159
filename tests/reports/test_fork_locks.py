"""A fork keeps no lock of an artifact, however idle it is."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from forks import KINDS, SECONDS, forking, holding, idle_fork

from propulsion_export.artifacts import changing, locking
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.errors import ArtifactError
from propulsion_export.serving.session import Session

pytestmark = forking


ADD = "import sys; from propulsion_export.cli import main; main(['adapter', 'add', *sys.argv[1:]])"
SHOW_OPEN = """
import os
for number in range(3, 64):
    try:
        print(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:
        pass
"""


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


def test_the_twin_of_all_these_holds_a_lock(copied):
    """A lock that a living process holds is not free, or the tests above would show nothing."""
    directory = copied("switchable")
    with locking.exclusive_lock(directory):
        descriptor = os.open(directory, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
