"""The reference server over a loopback socket, and as a program."""

import gc
import http.client
import json
import re
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

from propulsion_export import Session, export_onnx
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError

SAMPLES = Path(__file__).parents[2] / "samples"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SAMPLES)
    batching, server, load = map(import_module, ("batching", "server", "load"))

Row, Limits = batching.Row, batching.Limits
LABELS = {"one": ("no", "yes", "maybe"), "two": ("cold", "warm"), "three": ("a", "b", "c", "d")}
TEXTS = ("ba ca da", "fol ga", "hi ki li mi ni pi", "ra", "sa ta ba ca da fa ga ha")
LONG = 30.0  # seconds; nothing here takes as long


# The whole server


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_model, tiny_checkpoint, random_adapter):
    """A bank of `one` and `two`, and the directories of three adapters of 3, 2 and 4 labels."""
    root = tmp_path_factory.mktemp("served")
    base = tiny_checkpoint("bert", "text-classification")
    fingerprint = fingerprint_of_model(tiny_model("bert"))
    for seed, (name, labels) in enumerate(LABELS.items(), start=1):
        model = tiny_model("bert", num_labels=len(labels), id2label=None, label2id=None)
        made = random_adapter(
            model, seed, name, head=True, labels=labels, task="text-classification"
        )
        (root / name).mkdir()
        replace(made, base=str(base), fingerprint=fingerprint).write(root / name)
    export_onnx([root / name for name in LABELS], root / "all", mode="bank")
    shutil.copytree(root / "all", root / "bank")
    session = Session(root / "bank")
    session.remove("three")
    # What is right, by the content of the adapter and the text.
    every = Session(root / "all")
    right = {
        (reply.version, text): reply
        for name in ("base", *LABELS)
        for text in TEXTS
        for reply in every(text, name)
    }
    versions = {name: every(TEXTS[0], name)[0].version for name in ("base", *LABELS)}
    return SimpleNamespace(root=root, right=right, versions=versions)


@pytest.fixture
def session(world, tmp_path):
    return Session(shutil.copytree(world.root / "bank", tmp_path / "bank"))


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
def serving(session, **limits):
    """A server in a thread; `port`, `stop()` and `thread`."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    app = server.make_app(session, Limits(**limits))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
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


def test_answers_of_mixed_batches_are_those_of_each_row_alone(world, session):
    asked = [(text, name) for name in ("base", "one", "two") for text in TEXTS] * 8

    with serving(session, wait=0.02) as running, ThreadPoolExecutor(12) as clients:
        answers = [*clients.map(lambda row: predict(running.port, *row), asked)]
        _, metrics, _ = ask(running.port, "GET", "/metrics")

    for (text, name), (status, told, _) in zip(asked, answers, strict=True):
        assert (status, told["adapter"], told["version"]) == (200, name, world.versions[name])
        check_right(world, text, told)
    assert metrics["adapters_per_batch"] > 1.2
    assert metrics["rows_per_batch"] > 2


def test_the_right_answers_differ_by_adapter(world):
    for text in TEXTS:
        told = {json.dumps(world.right[v, text].prediction) for v in world.versions.values()}
        assert len(told) == len(world.versions)


def test_metrics_add_up(session):
    with serving(session) as running:
        rows = [Row(text, name).__dict__ for name in ("one", "two", "nobody") for text in TEXTS]
        for row in rows:
            ask(running.port, "POST", "/predict", row)
        ask(running.port, "POST", "/predict", rows)
        _, told, _ = ask(running.port, "GET", "/metrics")

    total = told["since_start"]
    assert total["received"] == 30
    assert (total["answered"], total["wrong"]) == (20, 10)
    assert (total["refused"], total["abandoned"], total["failed"]) == (0, 0, 0)
    assert told["rows"] == 20
    assert told["rows_by_adapter"] == {"one": 10, "two": 10}
    assert told["rows_per_batch"] * told["batches"] == pytest.approx(30)
    assert 0 < told["p50_ms"] <= told["p99_ms"] < 1000 * LONG
    assert told["rows_per_s"] * told["window_s"] == pytest.approx(20)


def test_a_wrong_request_does_not_touch_the_others_of_its_batch(world, session):
    gated = Gated(session)
    gated.gate.clear()
    asked = [("ba", "one"), ("ba", "nobody"), ("", "two"), ("ba ca", "two"), ("ra", "base")]

    with serving(gated) as running, ThreadPoolExecutor(len(asked) + 1) as clients:
        first = clients.submit(predict, running.port, "ba")
        wait_for(lambda: gated.calls)
        answers = [clients.submit(predict, running.port, *row) for row in asked]
        wait_for(lambda: ask(running.port, "GET", "/metrics")[1]["since_start"]["received"] == 6)
        gated.gate.set()
        statuses = [one.result()[0] for one in answers]
        errors = [answers[row].result()[1]["error"] for row in (1, 2)]
        assert first.result()[0] == 200

    assert statuses == [200, 404, 422, 200, 200]
    assert re.search(
        r"has no adapter 'nobody', expected one of base, one, two\. `propul", errors[0]
    )
    assert errors[1] == "text: is empty, expected some words"


def test_a_list_is_answered_row_by_row(world, session):
    rows = [
        {"text": TEXTS[0], "adapter": "two"},
        {"text": "ba", "adapter": "x"},
        {"text": TEXTS[1]},
    ]

    with serving(session) as running:
        status, told, _ = ask(running.port, "POST", "/predict", rows)

    assert status == 200
    assert [one.get("adapter", one.get("status")) for one in told] == ["two", 404, "base"]
    check_right(world, TEXTS[0], told[0])
    check_right(world, TEXTS[1], told[2])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"adapter": "one"}, "body.row.text: Field required"),
        ([{"text": "ba"}, {"text": 3}], "body.rows.1.text: Input should be a valid string"),
        ([], "0 rows in a request, expected 1 to 4"),
        ([{"text": "ba"}] * 5, "5 rows in a request, expected 1 to 4"),
    ],
)
def test_a_body_of_another_form_is_told_in_one_line(session, body, message):
    with serving(session, queue=4) as running:
        status, told, _ = ask(running.port, "POST", "/predict", body)

    assert status == 422
    assert told["error"].startswith(message)
    assert "\n" not in told["error"]


def test_a_full_queue_says_when_to_come_again(session):
    gated = Gated(session)
    gated.gate.clear()

    with serving(gated, queue=1) as running, ThreadPoolExecutor(2) as clients:
        computed = clients.submit(predict, running.port, "ba", "one")
        wait_for(lambda: gated.calls)
        waiting = clients.submit(predict, running.port, "ca", "two")
        wait_for(lambda: ask(running.port, "GET", "/metrics")[1]["since_start"]["received"] == 2)
        status, told, headers = predict(running.port, "da", "one")
        gated.gate.set()
        others = [computed.result()[0], waiting.result()[0]]

    assert (status, headers["Retry-After"]) == (503, "1")
    assert told["error"] == "the queue: holds 1 of 1 rows, no room for 1 more. Try again."
    assert others == [200, 200]


def test_who_hangs_up_is_not_computed_and_holds_nobody_up(session):
    gated = Gated(session)
    gated.gate.clear()

    with serving(gated) as running, ThreadPoolExecutor(1) as clients:
        first = clients.submit(predict, running.port, "ba", "one")
        wait_for(lambda: gated.calls)
        leaving = http.client.HTTPConnection("127.0.0.1", running.port, timeout=LONG)
        body = json.dumps({"text": "never", "adapter": "two"})
        leaving.request("POST", "/predict", body, {"content-type": "application/json"})
        wait_for(lambda: ask(running.port, "GET", "/metrics")[1]["since_start"]["received"] == 2)
        leaving.close()
        time.sleep(0.3)  # until the server has noticed
        gated.gate.set()
        assert first.result()[0] == 200
        assert predict(running.port, "ca", "two")[0] == 200
        _, metrics, _ = ask(running.port, "GET", "/metrics")

    assert [text for texts, _ in gated.calls for text in texts] == ["ba", "ca"]
    assert metrics["since_start"]["abandoned"] == 1


def test_adapters_change_under_load_and_every_answer_is_of_the_version_it_names(world, session):
    with serving(session) as running, ThreadPoolExecutor(6) as clients:
        done = threading.Event()

        def client(seed):
            answers = []
            while not done.is_set():
                text = TEXTS[(seed + len(answers)) % len(TEXTS)]
                name = ("one", "new", "two")[len(answers) % 3]
                answers.append((text, name, *predict(running.port, text, name)[:2]))
            return answers

        asking = [clients.submit(client, seed) for seed in range(5)]
        statuses = []
        for source in ("one", "two", "three", "one", "two", "three"):
            body = {"path": str(world.root / source)}
            statuses.append(ask(running.port, "PUT", "/adapters/new", body)[0])
            told = predict(running.port, TEXTS[0], "new")[1]
            assert told["version"] == world.versions[source]
            if source == "three":
                statuses.append(ask(running.port, "DELETE", "/adapters/new")[0])
                assert predict(running.port, TEXTS[0], "new")[0] == 404
        done.set()
        answers = [one for each in asking for one in each.result()]

    assert statuses == [204] * 8
    seen = Counter()
    for text, name, status, told in answers:
        if status == 404:
            assert (name, "has no adapter 'new'" in told["error"]) == ("new", True)
        else:
            assert status == 200
            assert name == "new" or told["version"] == world.versions[name]
            check_right(world, text, told)
        seen[name, status] += 1
    assert seen["new", 200] > 5
    assert seen["one", 200] > 5


def test_adapters_are_listed_and_mistakes_with_them_told(world, session, tmp_path):
    with serving(session) as running:
        port = running.port
        listed = [ask(port, "GET", "/adapters")[1]]
        put = ask(port, "PUT", "/adapters/more", {"path": str(world.root / "three")})[0]
        listed.append(ask(port, "GET", "/adapters")[1])
        wrong = [
            ask(port, "PUT", "/adapters/x", {"path": str(tmp_path / "nowhere")}),
            ask(port, "PUT", "/adapters/base", {"path": str(world.root / "one")}),
            ask(port, "DELETE", "/adapters/x"),
            ask(port, "PUT", "/adapters/x", {"path": "\ud800"}),
        ]
        # Another process changes them too.
        Session(tmp_path / "bank").remove("one")
        listed.append(ask(port, "GET", "/adapters")[1])

    assert put == 204
    assert listed == [
        ["base", "one", "two"],
        ["base", "more", "one", "two"],
        ["base", "more", "two"],
    ]
    assert [status for status, *_ in wrong] == [422, 422, 404, 422]
    assert "has no adapter_config.json, expected a PEFT" in wrong[0][1]["error"]
    assert "\\ud800" in wrong[3][1]["error"]


def test_a_repointed_link_is_followed_when_the_adapters_are_listed(world, tmp_path):
    releases = [tmp_path / f"release-{number}" for number in (1, 2, 3)]
    for release in releases:
        shutil.copytree(world.root / "bank", release)
    Session(releases[1]).add(f"more={world.root / 'three'}")
    other = Artifact.read(releases[2])
    base = replace(other.manifest.base, source="elsewhere")
    other.with_manifest(replace(other.manifest, base=base))
    link = tmp_path / "current"
    link.symlink_to(releases[0])
    with serving(Session(link)) as running:
        port, place = running.port, {"path": str(world.root / "three")}
        link.unlink()
        link.symlink_to(releases[1])
        early = [
            ask(port, "PUT", "/adapters/x", place),
            ask(port, "DELETE", "/adapters/one"),
            predict(port, TEXTS[0], "one"),
            predict(port, TEXTS[0], "more"),
        ]
        listed = [ask(port, "GET", "/adapters")[1]]
        statuses = [
            predict(port, TEXTS[0], "more")[0],
            ask(port, "PUT", "/adapters/x", place)[0],
            ask(port, "DELETE", "/adapters/one")[0],
        ]
        link.unlink()
        link.symlink_to(releases[2])
        refused = ask(port, "GET", "/adapters")
        still = predict(port, TEXTS[0], "x")[0]

    assert [status for status, *_ in early] == [422, 422, 200, 404]
    assert all("nothing was changed. Refresh" in told["error"] for _, told, _ in early[:2])
    assert listed == [["base", "more", "one", "two"]]
    assert (statuses, refused[0], still) == ([200, 204, 204], 500, 200)
    assert "release-3: is another model than" in refused[1]["error"]
    found = [sorted(Artifact.read(release).list_adapters()) for release in releases]
    assert found == [["one", "two"], ["more", "two", "x"], ["one", "two"]]


def test_stopping_finishes_what_was_accepted(session):
    gated = Gated(session)
    gated.gate.clear()

    with serving(gated, wait=0) as running, ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(predict, running.port, "ba", "one")]
        wait_for(lambda: gated.calls)
        asked += [clients.submit(predict, running.port, "ca", name) for name in ("one", "two")]
        wait_for(lambda: ask(running.port, "GET", "/metrics")[1]["since_start"]["received"] == 3)
        running.stop()
        time.sleep(0.2)  # it does not leave as long as it owes an answer
        assert running.thread.is_alive()
        gated.gate.set()
        answers = [one.result() for one in asked]
        running.thread.join(LONG)
        with pytest.raises(ConnectionError):
            predict(running.port, "da")

    assert [(status, told["adapter"]) for status, told, _ in answers] == [
        (200, "one"), (200, "one"), (200, "two"),
    ]  # fmt: skip


def test_health_and_a_bug_that_meets_one_request(session):
    class Breaking(Gated):
        def __call__(self, texts, adapter):
            if "bug" in texts:
                raise RuntimeError("not our day")
            return super().__call__(texts, adapter)

    with serving(Breaking(session)) as running:
        statuses = [predict(running.port, text)[0] for text in ("ba", "bug", "ba")]
        health = ask(running.port, "GET", "/health")[0]

    assert (statuses, health) == ([200, 500, 200], 204)


@pytest.mark.parametrize(
    ("error", "status"), [(UnknownAdapterError, 404), (UsageError, 422), (ArtifactError, 500)]
)
def test_whose_fault_a_failure_is(error, status):
    assert server.content(error("here: that")) == (
        {"error": "here: that", "status": status},
        status,
    )


def test_a_page_cannot_reach_it_under_a_name_of_its_own(session):
    with serving(session) as running:
        statuses = [
            ask(running.port, "GET", "/adapters", Host=f"{name}:{running.port}")[0]
            for name in ("evil.example", "localhost", "127.0.0.1", "[::1]")
        ]

    assert statuses == [400, 200, 200, 200]


# Limits


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


# As programs


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.3", "example.org"])
def test_an_address_that_others_reach_is_refused_with_the_reason(host, capsys):
    with pytest.raises(SystemExit, match="2"):
        server.main(["bank", "--host", host])

    told = " ".join(capsys.readouterr().err.split())
    assert f"{host} can be reached from other machines, expected 127.0.0.1, localhost, ::1" in told
    assert "no authentication" in told


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_loopback_address_is_not_refused(host):
    assert server.loopback(host) == host


def test_what_is_no_artifact_is_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as ended:
        server.main([str(tmp_path)])

    assert str(ended.value).startswith(f"samples/server.py: {tmp_path}")


def test_the_program_serves_on_the_loopback_address_alone(world, monkeypatch):
    started = {}
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: started.update(options))

    server.main([str(world.root / "bank"), "--port", "1234"])

    stopping = {"timeout_graceful_shutdown": server.STOPPING}
    assert started == {"host": "127.0.0.1", "port": 1234, "access_log": False} | stopping


def test_load_compares_two_servers(session, world, capsys):
    with (
        serving(session) as mixing,
        serving(Session(world.root / "bank"), by_adapter=True) as other,
    ):
        urls = [f"http://127.0.0.1:{one.port}" for one in (mixing, other)]
        options = ["--requests", "60", "--rounds", "2", "--concurrency", "12"]
        load.main(["--url", urls[0], "--against", urls[1], *options])
        metrics = [ask(one.port, "GET", "/metrics")[1] for one in (mixing, other)]

    first, *rounds, ratio = capsys.readouterr().out.splitlines()
    assert first == "12 clients, 2 adapters"
    assert [line.split()[0] for line in rounds] == urls * 2
    assert all("60 of 60 answered" in line for line in rounds)
    assert re.fullmatch(r"throughput: [\d.]+ times the other's \(rounds: [\d.]+, [\d.]+\)", ratio)
    assert metrics[0]["adapters_per_batch"] > 1
    assert metrics[1]["adapters_per_batch"] == 1


def test_load_counts_what_is_refused(session, capsys):
    class Slow(Gated):
        def __call__(self, texts, adapter):
            time.sleep(0.02)
            return super().__call__(texts, adapter)

    with serving(Slow(session), queue=1, rows=1) as running:
        url = f"http://127.0.0.1:{running.port}"
        load.main(["--url", url, "--requests", "40", "--rounds", "1", "--concurrency", "8"])

    assert re.search(r"\d+ of 40 answered .*not 200: \{503: \d+\}", capsys.readouterr().out)
