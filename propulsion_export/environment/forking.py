"""What a fork must not find half done, must not use, and must not do at its end.

A fork has one thread. What the others were doing is never finished there: their locks stay locked,
and what SQLite and a runtime remember of them is wrong.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from propulsion_export.errors import UsageError


class _Gate:
    """Lets any number of threads in, and a fork only while no other thread is inside."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside: dict[int, int] = {}  # how deep each thread is inside
        self.forking: set[int] = set()  # the threads that wait to fork

    def enter(self) -> None:
        me = threading.get_ident()
        with self.changed:
            self.changed.wait_for(lambda: me in self.inside or not self.forking - {me})
            self.inside[me] = self.inside.get(me, 0) + 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self.changed:
            self.inside[me] -= 1
            if not self.inside[me]:
                del self.inside[me]
                self.changed.notify_all()

    def close(self) -> None:
        """Wait until no other thread is inside; none gets in before `reopen`."""
        me = threading.get_ident()
        self.changed.acquire()
        self.forking.add(me)
        self.changed.wait_for(lambda: not self.inside.keys() - {me})

    def reopen(self) -> None:
        self.forking.discard(threading.get_ident())
        self.changed.notify_all()
        self.changed.release()

    def reopen_in_child(self) -> None:
        self.forking.clear()
        self.changed.release()


_gate = _Gate()
_handlers_hang = threading.Event()


@contextmanager
def no_fork() -> Iterator[None]:
    """Let forks wait until the block has ended; for what takes milliseconds.

    The thread itself may fork inside.
    """
    _gate.enter()
    try:
        yield
    finally:
        _gate.leave()


def refuse_fork(process: int, what: str) -> None:
    """Refuse to use something in another process than the one that opened it.

    Args:
        process: the number of the process that opened it.
        what: what it is, for the message.

    Raises:
        UsageError: this process is a fork of that one.
    """
    if os.getpid() != process:
        raise UsageError(
            f"the {what} was opened before this process was forked, expected one of its own",
            remedy=f"Open a {what} in each process.",
        )


def skip_exit_handlers_in_forks() -> None:
    """Let processes that are forked from now on end without what C libraries registered before.

    ONNX Runtime (1.32) destroys at the end of a process what its threads wait for, and a fork waits
    there for ever: `import onnxruntime`, a fork, and its end. Python's own handlers do run, and
    those that a fork registers itself. Remove this when that ends; tests/reports/test_forks.py
    shows it.
    """
    _handlers_hang.set()


def _in_child() -> None:
    _gate.reopen_in_child()
    libc = ctypes.CDLL(None)
    if _handlers_hang.is_set() and hasattr(libc, "on_exit"):  # glibc
        # The last one is called first: what is buffered is written, then the process ends.
        libc.on_exit(libc._exit, None)
        libc.__cxa_atexit(libc.fflush, None, None)


os.register_at_fork(before=_gate.close, after_in_parent=_gate.reopen, after_in_child=_in_child)
