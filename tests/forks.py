"""Processes and threads that stand where a fork finds them."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

# What tests of forks are about.
forking = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
KINDS = ("switchable", "banked")
IDS = np.array([[5, 6, 7, 8]])
INPUTS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
SECONDS = 20  # more than anything here takes, less than the patience of a lock


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
