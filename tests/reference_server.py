"""The reference server over a loopback socket, for tests that ask it."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

SAMPLES = Path(__file__).parents[1] / "samples"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SAMPLES)
    batching, server, load = map(import_module, ("batching", "server", "load"))
Row, Limits = batching.Row, batching.Limits
LABELS = {"one": ("no", "yes", "maybe"), "two": ("cold", "warm"), "three": ("a", "b", "c", "d")}
TEXTS = ("ba ca da", "fol ga", "hi ki li mi ni pi", "ra", "sa ta ba ca da fa ga ha")
LONG = 30.0  # seconds; nothing here takes as long


class Gated:
    """A session that waits at a gate and notes what it was asked."""

    def __init__(self, session):
        self.session = session
        self.calls = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, texts, adapter):
        self.calls.append((list(texts), list(adapter)))
        assert self.gate.wait(LONG)
        return self.session(texts, adapter=adapter)

    def __getattr__(self, name):
        return getattr(self.session, name)


@contextmanager
def serving(session, *, stopping=None, **limits):
    """A server in a thread; `port`, `stop()` and `thread`.

    `stopping`: seconds that it waits for answers that are owed when it stops; default: any.
    """
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    app = server.make_app(session, Limits(**limits))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=stopping)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_for(lambda: running.started or not thread.is_alive())
        yield SimpleNamespace(
            port=listening.getsockname()[1],
            stop=lambda: setattr(running, "should_exit", True),
            thread=thread,
        )
    finally:
        running.should_exit = True
        thread.join(LONG)
        listening.close()
        assert not thread.is_alive()


def wait_for(condition):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.002)


def ask(port, method, path, body=None, **headers):
    """Status, what was answered, and its headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, {"content-type": "application/json"} | headers)
    response = connection.getresponse()
    told = response.read()
    connection.close()
    is_json = response.headers.get("content-type") == "application/json"
    return response.status, json.loads(told) if is_json else told.decode(), response.headers


def predict(port, text, adapter="base"):
    return ask(port, "POST", "/predict", {"text": text, "adapter": adapter})


def check_right(world, text, told):
    expected = world.right[told["version"], text].prediction
    assert told["prediction"]["label"] == expected["label"]
    assert told["prediction"]["score"] == pytest.approx(expected["score"], abs=1.5e-6)


@contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=LONG) as connection:
        yield connection


def head(**headers):
    """The first bytes of a request to predict."""
    lines = ["POST /predict HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode()


def answered(connection):
    """The status and the body of an answer."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())
