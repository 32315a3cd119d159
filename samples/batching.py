"""Gather rows of any adapters into batches: what the reference server is about, without HTTP."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from propulsion_export import Reply, Session
from propulsion_export.errors import ArtifactError, PropulsionExportError, UsageError

WINDOW = 60.0  # seconds that Metrics looks back
# Rows since the start by what became of them (`wrong`: by the caller's mistake), and batches.
TOTALS = ("received", "answered", "wrong", "failed", "refused", "abandoned", "batches")


@dataclass(frozen=True)
class Row:
    text: str
    adapter: str = "base"


Answer = Reply | Exception


def answer(session: Session, rows: Sequence[Row]) -> list[Answer]:
    """What the session says of each row, whatever is wrong with those beside it."""
    try:
        if any(not row.text.strip() for row in rows):
            raise UsageError("text: is empty, expected some words")
        replies = session([row.text for row in rows], adapter=[row.adapter for row in rows])
        return [_of_nan(reply) if reply.has_nan else reply for reply in replies]
    except PropulsionExportError as error:
        if len(rows) == 1:
            return [error]
        half = len(rows) // 2  # until whoever it is stands alone; a right row is computed once
        return answer(session, rows[:half]) + answer(session, rows[half:])


def _of_nan(reply: Reply) -> ArtifactError:
    return ArtifactError(f"the adapter {reply.adapter!r} computes NaN of this text")


class Full(Exception):
    """There is no room for more rows now."""


@dataclass(frozen=True, eq=False)
class Waiting:
    row: Row
    since: float  # time.monotonic()
    answer: asyncio.Future[Answer]


@dataclass(frozen=True)
class Limits:
    rows: int = 8  # in a batch; a GPU takes more
    wait: float = 0.005  # seconds that the oldest row waits for company
    queue: int = 1024  # rows that may wait
    by_adapter: bool = False  # to compare: only rows of one adapter share a batch


class Batcher:
    """Gathers rows of any adapters while the rows before them are computed in a thread."""

    def __init__(
        self, compute: Callable[[Sequence[Row]], list[Answer]], limits: Limits, metrics: "Metrics"
    ) -> None:
        self._compute, self._limits, self._metrics = compute, limits, metrics
        self._queue: deque[Waiting] = deque()
        self._changed = asyncio.Event()
        self._closing = False

    def submit(self, rows: Sequence[Row]) -> list[asyncio.Future[Answer]]:
        """All of them are accepted or none; a caller who has gone cancels its futures.

        Raises:
            Full: come again.
            UsageError: there will never be room for so many.
        """
        most = self._limits.queue
        if not 0 < len(rows) <= most:
            raise UsageError(f"{len(rows)} rows in a request, expected 1 to {most}")
        self._metrics.total["received"] += len(rows)
        if self._closing or len(self._queue) + len(rows) > most:
            self._metrics.total["refused"] += len(rows)
            raise Full(f"the queue: has no room for {len(rows)} more of {most}. Try again.")
        loop, now = asyncio.get_running_loop(), time.monotonic()
        added = [Waiting(row, now, loop.create_future()) for row in rows]
        self._queue += added
        self._changed.set()
        return [waiting.answer for waiting in added]

    async def run(self) -> None:
        """Until it is closed and has answered all that it accepted."""
        with ThreadPoolExecutor(1, "batch") as thread:
            while await self._enough():
                if batch := self._take():
                    await self._answer(batch, thread)

    def close(self) -> None:
        self._closing = True
        self._changed.set()

    async def _enough(self) -> bool:
        """Once a batch is full or its oldest row has waited; false when there will be none."""
        while len(self._queue) < self._limits.rows and not self._closing:
            left = None  # with an empty queue, as long as it takes
            if self._queue:
                left = self._queue[0].since + self._limits.wait - time.monotonic()
                if left <= 0:
                    break
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()
        return bool(self._queue)

    def _take(self) -> list[Waiting]:
        """The oldest row, and those whose length is nearest to its own: padding costs."""
        here = [waiting for waiting in self._queue if not waiting.answer.cancelled()]
        self._metrics.total["abandoned"] += len(self._queue) - len(here)
        fitting = here
        if self._limits.by_adapter:
            fitting = [other for other in here if other.row.adapter == here[0].row.adapter]
        nearest = sorted(fitting, key=lambda one: abs(len(one.row.text) - len(here[0].row.text)))
        batch = nearest[: self._limits.rows]
        taken = {id(waiting) for waiting in batch}
        self._queue = deque(waiting for waiting in here if id(waiting) not in taken)
        return batch

    async def _answer(self, batch: list[Waiting], thread: ThreadPoolExecutor) -> None:
        rows = [waiting.row for waiting in batch]
        started = asyncio.get_running_loop().run_in_executor(thread, self._compute, rows)
        try:
            answers = await started
        except Exception as error:  # a bug: those it met are told, the next batch goes on
            answers = [error] * len(rows)
        for waiting, told in zip(batch, answers, strict=True):
            if not waiting.answer.cancelled():
                waiting.answer.set_result(told)
        self._metrics.batch(batch, answers)


class Metrics:
    """Counts rows since the start, and keeps what was answered within the window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = Counter(dict.fromkeys(TOTALS, 0))
        self._clock, self._start = clock, clock()
        self._rows: deque[tuple[float, float, str]] = deque()  # when, latency, adapter
        self._batches: deque[tuple[float, int, int]] = deque()  # when, rows, adapters

    def batch(self, batch: Sequence[Waiting], answers: Sequence[Answer]) -> None:
        now = self._clock()
        self.total["batches"] += 1
        self._batches.append((now, len(batch), len({one.row.adapter for one in batch})))
        for waiting, told in zip(batch, answers, strict=True):
            if waiting.answer.cancelled():
                self.total["abandoned"] += 1
            elif isinstance(told, Reply):
                self.total["answered"] += 1
                self._rows.append((now, now - waiting.since, told.adapter))
            else:
                wrong = isinstance(told, PropulsionExportError)
                self.total["wrong" if wrong else "failed"] += 1
        self._forget(now)

    def read(self) -> dict[str, Any]:
        now = self._clock()
        self._forget(now)
        seconds = max(min(WINDOW, now - self._start), 1e-9)
        latencies = [latency * 1000 for _, latency, _ in self._rows]
        p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies else (None, None)
        sizes = [(rows, adapters) for _, rows, adapters in self._batches]
        rows, adapters = np.mean(sizes, axis=0).tolist() if sizes else (None, None)
        return {
            "since_start": dict(self.total),
            "window_s": seconds,
            "rows": len(latencies),
            "rows_per_s": len(latencies) / seconds,
            "p50_ms": p50,
            "p99_ms": p99,
            "batches": len(sizes),
            "rows_per_batch": rows,
            "adapters_per_batch": adapters,
            "rows_by_adapter": Counter(adapter for _, _, adapter in self._rows),
        }

    def _forget(self, now: float) -> None:
        for kept in (self._rows, self._batches):
            while kept and kept[0][0] < now - WINDOW:
                kept.popleft()
