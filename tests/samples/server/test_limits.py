"""How long texts, bodies and waits may be, and who hangs up."""

import gc
import json
import socket
import struct
import time
from contextlib import suppress

import pytest
from reference_server import (
    TEXTS,
    Gated,
    answered,
    ask,
    check_right,
    connected,
    head,
    predict,
    serving,
)


def test_a_long_text_is_its_rows_own_mistake(world, session):
    rows = [{"text": TEXTS[0]}, {"text": "b" * 41}, {"text": "ba", "context": "c" * 41}]

    with serving(session, text=40) as running:
        status, told, _ = ask(running.port, "POST", "/predict", rows)

    assert status == 200
    check_right(world, TEXTS[0], told[0])
    assert told[1:] == [
        {"error": f"{name}: has 41 characters, expected at most 40", "status": 422}
        for name in ("text", "context")
    ]


def test_a_large_body_is_refused_before_it_is_sent(session):
    with serving(session, body=1000) as running, connected(running.port) as connection:
        connection.sendall(head(**{"Content-Length": 1001}))

        status, told = answered(connection)

    assert (status, told["error"]) == (413, "the request is larger than 1000 bytes")


@pytest.mark.parametrize("ended", [True, False], ids=["last-chunk", "more-to-come"])
def test_a_large_body_in_chunks_is_refused_where_it_is_too_large(session, ended):
    with serving(session, body=1000) as running, connected(running.port) as connection:
        chunk = b"1f5\r\n" + b" " * 501 + b"\r\n"
        end = b"0\r\n\r\n" if ended else b""
        connection.sendall(head(**{"Transfer-Encoding": "chunked"}) + chunk * 2 + end)

        status, told = answered(connection)

    assert (status, told["status"]) == (413, 413)


def test_a_body_of_the_size_that_it_may_have_is_answered(session):
    body = json.dumps({"text": "ba"}).encode()

    with serving(session, body=len(body)) as running, connected(running.port) as connection:
        connection.sendall(head(**{"Content-Length": len(body)}) + body)
        whole = answered(connection)
    with serving(session, body=len(body)) as running, connected(running.port) as connection:
        chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body)
        connection.sendall(head(**{"Transfer-Encoding": "chunked"}) + chunks + b"0\r\n\r\n")
        in_chunks = answered(connection)

    assert whole == in_chunks
    assert whole[0] == 200


def test_a_body_that_comes_too_slowly_is_refused(session):
    with serving(session, upload=0.3) as running, connected(running.port) as connection:
        connection.sendall(head(**{"Content-Length": 100}) + b"{")

        status, told = answered(connection)

    assert (status, told["error"]) == (408, "the request did not arrive within 0.3 s")


@pytest.mark.parametrize(
    "sent", [b"POST /pre", head(**{"Content-Length": 100})], ids=["head", "body"]
)
def test_stopping_does_not_wait_for_who_sends_a_byte_now_and_then(session, sent):
    with serving(session, upload=1.0) as running, connected(running.port) as connection:
        connection.sendall(sent)
        time.sleep(0.2)
        running.stop()
        with suppress(OSError):  # until the server closes the connection
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.05)
        running.thread.join(5)

        assert not running.thread.is_alive()


def test_who_hangs_up_leaves_nothing_on_stderr(session, capfd, caplog):
    gated = Gated(session)
    gated.gate.clear()
    row = json.dumps({"text": "ba"}).encode()
    body = head(**{"Content-Length": len(row)}) + row
    rows = head(**{"Content-Length": len(row) + 2}) + b"[" + row + b"]"
    refused = head(**{"Content-Length": 10**9})
    moments = [b"", b"POST /pre", body[:-3], body, rows, refused]

    with serving(gated) as running:
        for sent in moments * 2:
            with connected(running.port) as connection:
                # So that the server is told by a reset and not by an end.
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.sendall(sent)
                time.sleep(0.05)
        time.sleep(0.3)  # until the server has noticed
        gated.gate.set()
        assert predict(running.port, "ca")[0] == 200

    gc.collect()  # an exception that nobody retrieved is logged at its end
    assert capfd.readouterr().err == ""
    assert [record.getMessage() for record in caplog.records] == []
