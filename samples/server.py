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
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Discriminator, Tag
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batching import NO_OTHER_FIELDS, Answer, Batcher, Full, Limits, Metrics, Row, answer
from propulsion_export import Reply, Session
from propulsion_export.errors import (
    ArtifactError,
    PropulsionExportError,
    UnknownAdapterError,
    UsageError,
)

# The status of an error of each class; any other is a mistake in the request, 422.
STATUS = ((UnknownAdapterError, 404), (ArtifactError, 500))
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOPPING = 30  # seconds for answers that are owed when the server is told to stop
LINGER = 2.0  # seconds that a refused body may go on arriving: closing earlier loses the answer


@dataclass(frozen=True)
class Place:
    __pydantic_config__ = NO_OTHER_FIELDS

    path: str


def _form(body: Any) -> str:
    return "rows" if isinstance(body, list) else "row"


Body = Annotated[
    Annotated[Row, Tag("row")] | Annotated[list[Row], Tag("rows")], Discriminator(_form)
]


class Server:
    """The handlers of the requests; `make_app` lists their routes."""

    def __init__(self, session: Session, limits: Limits) -> None:
        self.session = session
        self.metrics = Metrics()
        compute = partial(answer, session, longest=limits.text)
        self.batcher = Batcher(compute, limits, self.metrics)

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Compute batches while the server runs; at the end, answer all accepted rows."""
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
            raise UsageError(f"{name}: is no name for an adapter, expected one without '='")
        await asyncio.to_thread(self.session.add, f"{name}={place.path}", force=True)
        return Response(status_code=204)

    async def delete(self, name: str) -> Response:
        await asyncio.to_thread(self.session.remove, name)
        return Response(status_code=204)

    async def read_metrics(self) -> dict[str, Any]:
        return self.metrics.read()

    async def health(self) -> Response:
        return Response(status_code=503 if self.batching.done() else 204)


class TooLarge(Exception):
    """A body has more bytes than it may have; `more` of them are still to come."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.more = more


class Stopping:
    """Answers a request that uvicorn cancels when the server has to stop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if scope["type"] != "http" or begun:
                raise
            await refusal(503, "the server stops, ask again")(scope, receive, send)


class BodyLimits:
    """Refuses a large or slow body before anything parses it."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        more = True
        try:
            async with asyncio.timeout(self.limits.upload):
                body = await self._read(scope, receive)
        except TimeoutError:
            refused = refusal(408, f"the request did not arrive within {self.limits.upload:g} s")
        except TooLarge as error:
            more = error.more
            refused = refusal(413, f"the request is larger than {self.limits.body} bytes")
        else:
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
            return
        await refused(scope, receive, partial(_and_linger, receive, send) if more else send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client disconnects first."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), True
        while max(len(body), int(stated)) <= self.limits.body:
            if not more:
                return bytes(body)
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        raise TooLarge(more)


async def _and_linger(receive: Receive, send: Send, message: Message) -> None:
    """Send a message of an answer; before the end wait for the rest of the request.

    A client that still sends when the connection is closed gets a reset in place of the answer.
    """
    if message["type"] == "http.response.body":
        await send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await receive()).get("more_body", False):
                    pass
        message = {"type": message["type"]}
    await send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What receives a body that was read, and then what comes after it."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


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
    for kind, handler in (
        (PropulsionExportError, respond_error),
        (RequestValidationError, respond_malformed),
        (HTTPException, respond_http),
        (Full, respond_full),
    ):
        app.add_exception_handler(kind, handler)
    app.add_middleware(BodyLimits, limits=limits)
    app.add_middleware(Stopping)
    # A page in a browser on this machine must not reach it under a domain name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    return app


async def unless_gone(request: Request, answers: list[asyncio.Future[Answer]]) -> list[Answer]:
    """The answers; none if the client disconnects first, and its rows are then not computed."""
    gone = asyncio.ensure_future(_disconnected(request))
    # Not gather: a cancelled one that nobody awaits is logged as an exception.
    answered = asyncio.ensure_future(asyncio.wait(answers))
    try:
        await asyncio.wait([gone, answered], return_when=asyncio.FIRST_COMPLETED)
        return [one.result() for one in answers] if answered.done() else []
    finally:
        for waiting in (gone, answered, *answers):
            waiting.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def content(result: Answer) -> tuple[dict[str, Any], int]:
    """The body of the response for a row, and its status."""
    if isinstance(result, Reply):
        prediction = dict(result.prediction or {})
        body = {"adapter": result.adapter, "version": result.version, "prediction": prediction}
        return body, 200
    if isinstance(result, PropulsionExportError):
        status = next((s for kind, s in STATUS if isinstance(result, kind)), 422)
        # It may name half a character that a request held, which no response can.
        told = str(result).encode(errors="backslashreplace").decode()
        return {"error": told, "status": status}, status
    raise result


async def respond_error(request: Request, error: PropulsionExportError) -> Response:
    return JSONResponse(*content(error))


async def respond_malformed(request: Request, error: RequestValidationError) -> Response:
    found = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return JSONResponse(
        *content(UsageError(*found, remedy="GET /openapi.json describes the requests."))
    )


async def respond_http(request: Request, error: HTTPException) -> Response:
    body = {"error": error.detail, "status": error.status_code}
    return JSONResponse(body, error.status_code, headers=error.headers)


async def respond_full(request: Request, error: Full) -> Response:
    return JSONResponse({"error": str(error), "status": 503}, 503, headers={"Retry-After": "1"})


def refusal(status: int, told: str) -> Response:
    """The answer of a server that closes the connection behind it."""
    body = {"error": told, "status": status}
    return JSONResponse(body, status, headers={"Connection": "close"})


def loopback(host: str) -> str:
    if host in LOOPBACK:
        return host
    raise argparse.ArgumentTypeError(
        f"{host} can be reached from other machines, expected {', '.join(LOOPBACK)}: this server "
        "has no authentication. Put one that has it in front."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a bank of adapters on this machine.")
    parser.add_argument("bank", help="directory written by `propulsion-export onnx --mode bank`")
    parser.add_argument("--host", type=loopback, default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-rows", type=int, default=Limits.rows, help="per batch")
    parser.add_argument(
        "--max-wait-ms", type=float, default=Limits.wait * 1000, help="for other rows"
    )
    parser.add_argument("--max-queue", type=int, default=Limits.queue, help="rows that may wait")
    parser.add_argument("--max-text", type=int, default=Limits.text, help="characters of a text")
    parser.add_argument("--max-body", type=int, default=Limits.body, help="bytes of a request")
    parser.add_argument(
        "--max-upload-s", type=float, default=Limits.upload, help="until a request has arrived"
    )
    parser.add_argument("--batch-by-adapter", action="store_true", help="for comparison")
    chosen = parser.parse_args(arguments)
    limits = Limits(
        chosen.max_rows,
        chosen.max_wait_ms / 1000,
        chosen.max_queue,
        chosen.batch_by_adapter,
        chosen.max_text,
        chosen.max_body,
        chosen.max_upload_s,
    )
    try:
        session = Session(chosen.bank)
        session("warm up")  # loads the tokenizer
    except PropulsionExportError as error:
        sys.exit(f"samples/server.py: {error}")
    uvicorn.run(
        make_app(session, limits),
        host=chosen.host,
        port=chosen.port,
        access_log=False,
        timeout_graceful_shutdown=STOPPING,
    )


if __name__ == "__main__":
    main()
