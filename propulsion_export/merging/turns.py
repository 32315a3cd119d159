"""Digests of files whose pieces several threads compute at the same time."""

import hashlib
import threading
from typing import Any


class Stopped(Exception):
    """Another thread has failed."""


class Turns:
    """Threads wait in it for each other; `stop` ends the waiting of all."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._stopped = False

    def stop(self) -> None:
        """Let every `Digest` raise `Stopped` instead of waiting."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def check(self) -> None:
        """Raise `Stopped` after `stop`."""
        if self._stopped:
            raise Stopped

    def wait_for(self, digest: "Digest", number: int) -> None:
        """Return when `digest` has the pieces before that number."""
        with self._change:
            self._change.wait_for(lambda: self._stopped or digest.pieces == number)
        self.check()

    def next(self, digest: "Digest") -> None:
        """Count a piece of `digest`, and wake the thread that has the next one."""
        with self._change:
            digest.pieces += 1
            self._change.notify_all()


class Digest:
    """The sha256 of a file, whose pieces are numbered from 0 and may come in any order.

    Attributes:
        pieces: how many it has so far.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns, self.pieces = turns, 0
        self._sha256 = hashlib.sha256()

    def add(self, number: int, data: Any) -> None:
        """Add the piece of that number, after waiting for those before it.

        Raises:
            Stopped: another thread has failed.
        """
        self._turns.wait_for(self, number)
        self._sha256.update(data)
        self._turns.next(self)

    @property
    def value(self) -> str:
        """`sha256:…`."""
        return f"sha256:{self._sha256.hexdigest()}"
