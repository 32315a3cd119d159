"""What the reference server answers to who asks wrongly, too much, or too late.

The session is a stand-in that knows no model: what is told here is the server's own.
"""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from reference_server import LONG, batching, server, serving, wait_for

JSON = {"content-type": "application/json"}


class Session:
    """Answers every text once its gate is open."""

    adapters = ("one",)

    def __init__(self):
        self.gate, self.asked = threading.Event(), []
        self.gate.set()

    def __call__(self, texts, adapter, context=()):
        self.asked += texts
        assert self.gate.wait(LONG)
        return [batching.Reply(name, "version", prediction={"label": "yes"}) for name in adapter]

    def refresh(self):
        pass


def ask(port, body, *, method="POST", path="/predict", headers=JSON):
    """The status and the body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    told = response.read()
    connection.close()
    return response.status, json.loads(told)


def assert_error(answer, status, *words):
    """All errors have one form, and one line."""
    found, told = answer
    assert (found, told["status"]) == (status, status)
    assert sorted(told) == ["error", "status"]
    assert all(word in told["error"] for word in words)
    assert "\n" not in told["error"]


@pytest.mark.parametrize("size", [10**5, 2 * 10**7])
def test_a_client_that_sends_a_large_body_whole_before_it_reads_is_answered(size):
    with serving(Session(), body=1000) as running:
        assert_error(ask(running.port, b" " * size), 413, "is larger than 1000 bytes")


def test_a_client_that_sends_a_large_body_in_chunks_is_answered():
    chunks = (b" " * 10**6 for _ in range(20))

    with serving(Session(), body=1000) as running:
        assert_error(ask(running.port, chunks), 413, "is larger than 1000 bytes")


def test_a_body_that_never_ends_is_waited_for_no_longer_than_a_while(monkeypatch):
    monkeypatch.setattr(server, "LINGER", 0.3)

    with (
        serving(Session(), body=1000) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=LONG) as connection,
    ):
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
        )
        response = http.client.HTTPResponse(connection)
        response.begin()
        told = response.status, json.loads(response.read())
        began = time.monotonic()
        while connection.recv(1000):  # until the server closes the connection
            pass
        waited = time.monotonic() - began

    assert_error(told, 413)
    assert waited < 2


def test_rows_that_are_owed_too_long_at_the_end_are_refused_in_one_line(capfd):
    session = Session()
    session.gate.clear()

    with (
        serving(session, stopping=1, rows=1) as running,
        ThreadPoolExecutor(3) as clients,
    ):
        asked = [clients.submit(ask, running.port, json.dumps({"text": "ba"})) for _ in range(3)]
        wait_for(lambda: session.asked)
        time.sleep(0.1)  # until all three wait
        running.stop()
        answers = [one.result() for one in asked]
        session.gate.set()

    for answer in answers:
        assert_error(answer, 503, "the server stops")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("Cancel 3 running task(s), timeout graceful shutdown exceeded")
    assert len(session.asked) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": "ba", "adaptor": "one"}, ["body.row.adaptor: "]),
        ([{"text": "ba"}, {"text": "ca", "Context": "b"}], ["body.rows.1.Context: "]),
        ({"text": "ba", "a\nb": 1}, ["body.row.a"]),
    ],
    ids=["a row", "a row of many", "two lines"],
)
def test_a_field_that_a_row_does_not_have_is_named(body, words):
    session = Session()

    with serving(session) as running:
        assert_error(ask(running.port, json.dumps(body)), 422, *words)

    assert session.asked == []


def test_a_field_that_a_place_does_not_have_is_named():
    body = json.dumps({"path": "there", "force": True})

    with serving(Session()) as running:
        answer = ask(running.port, body, method="PUT", path="/adapters/x")

    assert_error(answer, 422, "body.force: ")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"text=ba", JSON, 422),
        (b"{", JSON, 422),
        (b"", JSON, 422),
        (b'{"text": "\xff"}', JSON, 400),
        (b"[" * 10**5, JSON, 400),
        (b'{"text": %s}' % (b"9" * 5000), JSON, 400),
        (b'{"text": "ba", "\\ud800": 1}', JSON, 422),
        (b'{"text": "ba"}', {"content-type": "text/plain"}, 422),
        (b'"ba"', JSON, 422),
    ],
    ids=[
        "form", "half", "empty", "no UTF-8", "deep", "large number", "half a character", "text",
        "string",
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_has_an_error_like_the_others(body, headers, status):
    with serving(Session()) as running:
        assert_error(ask(running.port, body, headers=headers), status)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/predict", 405)]
)
def test_so_has_a_path_or_a_method_that_there_is_not(method, path, status):
    with serving(Session()) as running:
        assert_error(ask(running.port, None, method=method, path=path), status)
