"""Gather rows of any adapters into batches: the core of the reference server, without HTTP."""

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
# Counts since the start: rows by outcome (`wrong`: the caller's mistake), and batches.
TOTALS = ("received", "answered", "wrong", "failed", "refused", "abandoned", "batches")
# For pydantic: a field of another name, misspelt, is an error and not ignored.
NO_OTHER_FIELDS = {"extra": "forbid"}


@dataclass(frozen=True)
class Row:
    __pydantic_config__ = NO_OTHER_FIELDS

    text: str
    adapter: str = "base"
    context: str | None = None  # the second text of a pair, or the text that a question is about


Answer = Reply | Exception


def answer(session: Session, rows: Sequence[Row], longest: int | None = None) -> list[Answer]:
    """The session's answer for each row; an error in one row does not affect the others.

    `longest` is the most characters that a text may have.
    """
    try:
        for row in rows:
            _check(row, longest)
        replies = _replies(session, rows)
        return [_no_numbers(reply) if reply.has_nan else reply for reply in replies]
    except PropulsionExportError as error:
        if len(rows) == 1:
            return [error]
        half = len(rows) // 2  # until a failing row is alone; a good row is computed once
        return answer(session, rows[:half], longest) + answer(session, rows[half:], longest)


def _check(row: Row, longest: int | None) -> None:
    for name, text in (("text", row.text), ("context", row.context or "")):
        if longest is not None and len(text) > longest:
            raise UsageError(f"{name}: has {len(text)} characters, expected at most {longest}")
    if not row.text.strip():
        raise UsageError("text: is empty, expected some words")


def _replies(session: Session, rows: Sequence[Row]) -> list[Reply]:
    """The session's replies, of single texts and of pairs, which no batch holds together."""
    found: dict[int, Reply] = {}
    for paired in (False, True):
        numbers = [n for n, row in enumerate(rows) if (row.context is not None) == paired]
        if numbers:
            own = [rows[number] for number in numbers]
            pairs = {"context": [row.context or "" for row in own]} if paired else {}
            adapters = [row.adapter for row in own]
            replies = session([row.text for row in own], adapter=adapters, **pairs)
            found |= dict(zip(numbers, replies, strict=True))
    return [found[number] for number in range(len(rows))]


def _no_numbers(reply: Reply) -> ArtifactError:
    return ArtifactError(f"the adapter {reply.adapter!r} computes NaN or infinity for this text")


class Full(Exception):
    """The queue has no room for more rows now."""


@dataclass(frozen=True, eq=False)
class Waiting:
    row: Row
    since: float  # time.monotonic()
    answer: asyncio.Future[Answer]


@dataclass(frozen=True)
class Limits:
    rows: int = 8  # in a batch; a GPU takes more
    wait: float = 0.005  # seconds that the oldest row waits for others
    queue: int = 1024  # rows that may wait, and that a request may have
    by_adapter: bool = False  # only rows of one adapter share a batch, for comparison
    text: int = 100_000  # characters of a text
    body: int = 2**23  # bytes of a request
    upload: float = 10.0  # seconds that a request may take to arrive


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
        """Queue all of the rows or none; a caller that goes away cancels its futures.

        Raises:
            Full: the queue has no room now; try again later.
            UsageError: no rows, or more than the queue can ever hold.
        """
        most = self._limits.queue
        if not 0 < len(rows) <= most:
            raise UsageError(f"{len(rows)} rows in a request, expected 1 to {most}")
        self._metrics.total["received"] += len(rows)
        if self._closing or len(self._queue) + len(rows) > most:
            self._metrics.total["refused"] += len(rows)
            raise Full(
                f"the queue: holds {len(self._queue)} of {most} rows, no room for {len(rows)} "
                "more. Try again."
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        added = [Waiting(row, now, loop.create_future()) for row in rows]
        self._queue += added
        self._changed.set()
        return [waiting.answer for waiting in added]

    async def run(self) -> None:
        """Compute batches until the batcher is closed and every accepted row is answered."""
        with ThreadPoolExecutor(1, "batch") as thread:
            while await self._enough():
                if batch := self._take():
                    await self._answer(batch, thread)

    def close(self) -> None:
        self._closing = True
        self._changed.set()

    async def _enough(self) -> bool:
        """Wait until a batch is full or its oldest row has waited; false once closed and empty."""
        while len(self._queue) < self._limits.rows and not self._closing:
            left = None  # an empty queue waits without a limit
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
        """The oldest row, and those whose length is nearest to its own, to save padding."""
        kept = [waiting for waiting in self._queue if not waiting.answer.cancelled()]
        self._metrics.total["abandoned"] += len(self._queue) - len(kept)
        fitting = kept
        if self._limits.by_adapter:
            fitting = [other for other in kept if other.row.adapter == kept[0].row.adapter]
        nearest = sorted(fitting, key=lambda one: abs(len(one.row.text) - len(kept[0].row.text)))
        batch = nearest[: self._limits.rows]
        taken = {id(waiting) for waiting in batch}
        self._queue = deque(waiting for waiting in kept if id(waiting) not in taken)
        return batch

    async def _answer(self, batch: list[Waiting], thread: ThreadPoolExecutor) -> None:
        rows = [waiting.row for waiting in batch]
        started = asyncio.get_running_loop().run_in_executor(thread, self._compute, rows)
        try:
            answers = await started
        except Exception as error:  # a bug fails its batch; the next batch still runs
            answers = [error] * len(rows)
        for waiting, result in zip(batch, answers, strict=True):
            if not waiting.answer.cancelled():
                waiting.answer.set_result(result)
        self._metrics.batch(batch, answers)


class Metrics:
    """Counts since the start, and the answers and batches within the window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = Counter(dict.fromkeys(TOTALS, 0))
        self._clock, self._start = clock, clock()
        self._rows: deque[tuple[float, float, str]] = deque()  # when, latency, adapter
        self._batches: deque[tuple[float, int, int]] = deque()  # when, rows, adapters

    def batch(self, batch: Sequence[Waiting], answers: Sequence[Answer]) -> None:
        now = self._clock()
        self.total["batches"] += 1
        self._batches.append((now, len(batch), len({one.row.adapter for one in batch})))
        for waiting, result in zip(batch, answers, strict=True):
            if waiting.answer.cancelled():
                self.total["abandoned"] += 1
            elif isinstance(result, Reply):
                self.total["answered"] += 1
                self._rows.append((now, now - waiting.since, result.adapter))
            else:
                wrong = isinstance(result, PropulsionExportError)
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
