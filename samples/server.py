"""A reference server: requests for different adapters share a batch, which a bank makes free.

    .venv/bin/python samples/server.py build/bank
    curl -s 127.0.0.1:8000/predict -H 'content-type: application/json' \
        -d '{"text": "a large wild cat with stripes", "adapter": "topic"}'

It has no authentication and opens directories by path, so it listens on loopback addresses only.
"""

import argparse
import asyncio
import ipaddress
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import Discriminator, FastAPI, Request, Response, Tag
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from propulsion_export import Reply, Session
from propulsion_export.errors import ArtifactError, PropulsionExportError, UsageError

WINDOW = 60.0  # seconds that /metrics looks back


class Row(BaseModel):
    text: str
    adapter: str = "base"


class Place(BaseModel):
    path: str


def _form(body: Any) -> str:
    return "rows" if isinstance(body, list) else "row"


Body = Annotated[
    Annotated[Row, Tag("row")] | Annotated[list[Row], Tag("rows")], Discriminator(_form)
]
Answer = Reply | Exception


# One call for many rows


def answer(session: Session, rows: Sequence[Row]) -> list[Answer]:
    """What the session says of each row, whatever is wrong with those beside it."""
    try:
        if any(not row.text.strip() for row in rows):
            raise UsageError("text: is empty, expected some words")
        return [*session([row.text for row in rows], adapter=[row.adapter for row in rows])]
    except PropulsionExportError as error:
        if len(rows) == 1:
            return [error]
        half = len(rows) // 2  # until whoever it is stands alone; a right row is computed once
        return answer(session, rows[:half]) + answer(session, rows[half:])


class Full(Exception):
    """There is no room for more rows now."""


@dataclass(frozen=True, eq=False)
class Waiting:
    row: Row
    since: float  # time.monotonic()
    answer: asyncio.Future[Answer]


@dataclass(frozen=True)
class Limits:
    rows: int = 32  # in a batch
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
        """The oldest rows, without those whose callers have gone."""
        here = [waiting for waiting in self._queue if not waiting.answer.cancelled()]
        self._metrics.total["abandoned"] += len(self._queue) - len(here)
        fitting = here
        if self._limits.by_adapter:
            fitting = [other for other in here if other.row.adapter == here[0].row.adapter]
        batch = fitting[: self._limits.rows]
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
        self.total = Counter(dict.fromkeys(("received", "answered", "wrong", "failed"), 0))
        self.total |= dict.fromkeys(("refused", "abandoned", "batches"), 0)
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


# HTTP


def make_app(session: Session, limits: Limits) -> FastAPI:
    metrics = Metrics()
    batcher = Batcher(lambda rows: answer(session, rows), limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(session, "warm up")  # reads the tokenizer
        app.state.running = asyncio.create_task(batcher.run())
        yield
        batcher.close()
        await app.state.running

    app = FastAPI(title="A bank of adapters", lifespan=lifespan)
    # A page in a browser on this machine may not reach it under a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    @app.post("/predict")
    async def predict(body: Body, request: Request) -> Response:
        rows = body if isinstance(body, list) else [body]
        told = await unless_gone(request, batcher.submit(rows))
        if isinstance(body, list):
            return JSONResponse([content(one)[0] for one in told])
        return JSONResponse(*content(told[0])) if told else Response(status_code=499)

    @app.get("/adapters")
    async def adapters() -> list[str]:
        await asyncio.to_thread(session.refresh)  # the command line may have changed them
        return ["base", *session.adapters]

    @app.put("/adapters/{name}", status_code=204)
    async def put(name: str, place: Place) -> None:
        await asyncio.to_thread(session.add, f"{name}={place.path}", force=True)

    @app.delete("/adapters/{name}", status_code=204)
    async def delete(name: str) -> None:
        try:
            await asyncio.to_thread(session.remove, name)
        except UsageError as error:
            raise ArtifactError(*error.findings, remedy=error.remedy) from error

    @app.get("/metrics")
    async def read_metrics() -> dict[str, Any]:
        return metrics.read()

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if app.state.running.done() else 204)

    @app.exception_handler(PropulsionExportError)
    async def wrong(request: Request, error: PropulsionExportError) -> Response:
        return JSONResponse(*content(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        found = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return JSONResponse(*content(UsageError(*found, remedy="/openapi.json has the form.")))

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> Response:
        return JSONResponse({"error": str(error)}, 503, headers={"Retry-After": "1"})

    return app


def content(told: Answer) -> tuple[dict[str, Any], int]:
    """What a client reads, and the status."""
    if isinstance(told, Reply):
        prediction = dict(told.prediction or {})
        return {"adapter": told.adapter, "version": told.version, "prediction": prediction}, 200
    if isinstance(told, PropulsionExportError):
        status = 404 if isinstance(told, ArtifactError) else 422
        return {"error": str(told), "status": status}, status
    raise told


async def unless_gone(request: Request, answers: list[asyncio.Future[Answer]]) -> list[Answer]:
    """The answers; none when the client goes first, whose rows are then not computed any more."""
    gone = asyncio.ensure_future(_disconnected(request))
    answered = asyncio.gather(*answers)
    await asyncio.wait([gone, answered], return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if answered.done():
        return answered.result()
    answered.cancel()
    return []


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def loopback(host: str) -> str:
    with suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return host
    raise argparse.ArgumentTypeError(
        f"{host} can be reached from other machines, expected a loopback address: there is no "
        "authentication here. Put a server that has it in front."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a bank of adapters on this machine.")
    parser.add_argument("bank", help="what `propulsion-export onnx --mode bank` wrote")
    parser.add_argument("--host", type=loopback, default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-rows", type=int, default=Limits.rows, help="in a batch")
    parser.add_argument("--max-wait-ms", type=float, default=Limits.wait * 1000)
    parser.add_argument("--max-queue", type=int, default=Limits.queue, help="rows that may wait")
    parser.add_argument("--batch-by-adapter", action="store_true", help="only to compare")
    chosen = parser.parse_args(arguments)
    limits = Limits(
        chosen.max_rows, chosen.max_wait_ms / 1000, chosen.max_queue, chosen.batch_by_adapter
    )
    try:
        app = make_app(Session(chosen.bank), limits)
    except PropulsionExportError as error:
        sys.exit(f"samples/server.py: {error}")
    uvicorn.run(app, host=chosen.host, port=chosen.port, access_log=False)


if __name__ == "__main__":
    main()
