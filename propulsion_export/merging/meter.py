"""The progress of a merge in bytes."""

import time

from propulsion_export.environment.progress import Progress

_EVERY = 1.0  # seconds between two reports


class Meter:
    """Count bytes, and report about once a second how many there are and how fast they come.

    Args:
        total: how many there will be.
        progress: called with the share done and what is being done.
    """

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._done, self._start = 0, time.monotonic()
        self._reported = self._start

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._reported >= _EVERY:
            self._reported = time.monotonic()
            self._report(self._reported - self._start)

    def _report(self, seconds: float) -> None:
        self._progress(
            0.1 + 0.85 * self._done / max(self._total, 1),
            f"folding: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, "
            f"{self._done / seconds / 1e6:.0f} MB/s",
        )
