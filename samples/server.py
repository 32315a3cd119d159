"""A reference server: requests for different adapters share a batch.

    .venv/bin/python samples/server.py build/bank
    curl -s 127.0.0.1:8000/predict -H 'content-type: application/json' \\
        -d '{"text": "a large wild cat with stripes", "adapter": "topic"}'

It has no authentication and opens directories by path, so it listens on loopback addresses only.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Discriminator, Tag
from starlette.middleware.trustedhost import TrustedHostMiddleware

from batching import Answer, Batcher, Full, Limits, Metrics, Row, answer
from propulsion_export import Reply, Session
from propulsion_export.errors import (
    ArtifactError,
    PropulsionExportError,
    UnknownAdapterError,
    UsageError,
)

# What is not the fault of the request, or is told apart from other faults of it.
STATUS = ((UnknownAdapterError, 404), (ArtifactError, 500))
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Place:
    path: str


def _form(body: Any) -> str:
    return "rows" if isinstance(body, list) else "row"


Body = Annotated[
    Annotated[Row, Tag("row")] | Annotated[list[Row], Tag("rows")], Discriminator(_form)
]


class Server:
    """What is done for each request; see `make_app` for which is which."""

    def __init__(self, session: Session, limits: Limits) -> None:
        self.session = session
        self.metrics = Metrics()
        self.batcher = Batcher(partial(answer, session), limits, self.metrics)

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """While the server runs; what it has accepted is answered at the end."""
        self.batching = asyncio.create_task(self.batcher.run())
        yield
        self.batcher.close()
        await self.batching

    async def predict(self, body: Body, request: Request) -> Response:
        rows = body if isinstance(body, list) else [body]
        answers = await unless_gone(request, self.batcher.submit(rows))
        if isinstance(body, list):
            return JSONResponse([content(one)[0] for one in answers])
        return JSONResponse(*content(answers[0])) if answers else Response(status_code=499)

    async def adapters(self) -> list[str]:
        await asyncio.to_thread(self.session.refresh)  # others may have changed them
        return ["base", *self.session.adapters]

    async def put(self, name: str, place: Place) -> Response:
        if "=" in name:
            raise UsageError(f"an adapter cannot be called {name!r}")
        await asyncio.to_thread(self.session.add, f"{name}={place.path}", force=True)
        return Response(status_code=204)

    async def delete(self, name: str) -> Response:
        await asyncio.to_thread(self.session.remove, name)
        return Response(status_code=204)

    async def read_metrics(self) -> dict[str, Any]:
        return self.metrics.read()

    async def health(self) -> Response:
        return Response(status_code=503 if self.batching.done() else 204)


def make_app(session: Session, limits: Limits) -> FastAPI:
    server = Server(session, limits)
    app = FastAPI(title="A bank of adapters", lifespan=server.running)
    for method, path, call in (
        ("POST", "/predict", server.predict),
        ("GET", "/adapters", server.adapters),
        ("PUT", "/adapters/{name}", server.put),
        ("DELETE", "/adapters/{name}", server.delete),
        ("GET", "/metrics", server.read_metrics),
        ("GET", "/health", server.health),
    ):
        app.add_api_route(path, call, methods=[method])
    for kind, tell in (
        (PropulsionExportError, tell_wrong),
        (RequestValidationError, tell_malformed),
        (Full, tell_full),
    ):
        app.add_exception_handler(kind, tell)
    # A page in a browser on this machine may not reach it under a name of the page's own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    return app


async def unless_gone(request: Request, answers: list[asyncio.Future[Answer]]) -> list[Answer]:
    """The answers; none if the client leaves before, whose rows are then not computed."""
    gone = asyncio.ensure_future(_disconnected(request))
    answered = asyncio.gather(*answers)
    try:
        await asyncio.wait([gone, answered], return_when=asyncio.FIRST_COMPLETED)
        return answered.result() if answered.done() else []
    finally:
        gone.cancel()
        answered.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def content(told: Answer) -> tuple[dict[str, Any], int]:
    """What a client reads of a row, and the status."""
    if isinstance(told, Reply):
        prediction = dict(told.prediction or {})
        return {"adapter": told.adapter, "version": told.version, "prediction": prediction}, 200
    if isinstance(told, PropulsionExportError):
        status = next((s for kind, s in STATUS if isinstance(told, kind)), 422)
        return {"error": str(told), "status": status}, status
    raise told


async def tell_wrong(request: Request, error: PropulsionExportError) -> Response:
    return JSONResponse(*content(error))


async def tell_malformed(request: Request, error: RequestValidationError) -> Response:
    found = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return JSONResponse(*content(UsageError(*found, remedy="GET /openapi.json has the form.")))


async def tell_full(request: Request, error: Full) -> Response:
    return JSONResponse({"error": str(error), "status": 503}, 503, headers={"Retry-After": "1"})


def loopback(host: str) -> str:
    if host in LOOPBACK:
        return host
    raise argparse.ArgumentTypeError(
        f"{host} can be reached from other machines, expected {', '.join(LOOPBACK)}: there is no "
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
        session = Session(chosen.bank)
        session("warm up")  # reads the tokenizer
    except PropulsionExportError as error:
        sys.exit(f"samples/server.py: {error}")
    uvicorn.run(make_app(session, limits), host=chosen.host, port=chosen.port, access_log=False)


if __name__ == "__main__":
    main()
