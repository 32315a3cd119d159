"""The reference server: its batcher alone, then the whole over a loopback socket."""

import asyncio
import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export import Reply, Session, export_onnx
from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError
from propulsion_export.model_fingerprint import fingerprint_of_model

SAMPLES = Path(__file__).parents[1] / "samples"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SAMPLES)
    batching, server, load = map(import_module, ("batching", "server", "load"))

Row, Limits = batching.Row, batching.Limits
LABELS = {"one": ("no", "yes", "maybe"), "two": ("cold", "warm"), "three": ("a", "b", "c", "d")}
TEXTS = ("ba ca da", "fol ga", "hi ki li mi ni pi", "ra", "sa ta ba ca da fa ga ha")
LONG = 30.0  # seconds; nothing here takes as long


# One call for many rows


class Known:
    """A session that knows two adapters, and notes the texts it has computed."""

    def __init__(self):
        self.computed = []

    def __call__(self, texts, adapter):
        if unknown := {*adapter} - {"one", "two"}:
            raise UnknownAdapterError(f"there is no adapter {min(unknown)}")
        self.computed += texts
        return [
            Reply(name, "v1", prediction={"label": text})
            for text, name in zip(texts, adapter, strict=True)
        ]


@given(st.lists(st.sampled_from(["one", "two", "three", ""]), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_a_wrong_row_is_told_and_every_other_is_computed_once(names):
    session = Known()
    rows = [
        Row(f"text {number}", name) if name else Row(" ", "one")
        for number, name in enumerate(names)
    ]

    answers = batching.answer(session, rows)

    right = [row for row in rows if row.adapter != "three" and row.text != " "]
    assert sorted(session.computed) == sorted(row.text for row in right)
    for row, told in zip(rows, answers, strict=True):
        if row in right:
            assert (told.adapter, told.prediction) == (row.adapter, {"label": row.text})
        else:
            assert type(told) is (UnknownAdapterError if row.adapter == "three" else UsageError)


# The batcher alone


class Noting:
    """Computes nothing, notes each batch, and waits at a gate."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, rows):
        self.batches.append([row.adapter for row in rows])
        assert self.gate.wait(LONG)
        return [Reply(row.adapter, "v1", prediction={}) for row in rows]


def batched(scenario, **limits):
    """What a scenario returns, which gets a running batcher, what it computes with, its metrics."""

    async def run():
        compute, metrics = Noting(), batching.Metrics()
        batcher = batching.Batcher(compute, Limits(**{"wait": 0.001} | limits), metrics)
        running = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(scenario(batcher, compute, metrics), LONG)
        finally:
            compute.gate.set()
            batcher.close()
            await asyncio.wait_for(running, LONG)

    return asyncio.run(run())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("by_adapter", "batches"), [(False, [["a", "b", "a"]]), (True, [["a", "a"], ["b"]])]
)
def test_rows_of_different_adapters_share_a_batch_unless_told_not_to(by_adapter, batches):
    async def scenario(batcher, compute, metrics):
        answers = await asyncio.gather(*batcher.submit([Row("t", name) for name in "aba"]))
        return [told.adapter for told in answers], compute.batches, metrics.read()

    told, computed, metrics = batched(scenario, by_adapter=by_adapter)

    assert told == ["a", "b", "a"]
    assert computed == batches
    assert metrics["adapters_per_batch"] == (1 if by_adapter else 2)


def test_a_full_batch_waits_for_nobody():
    async def scenario(batcher, compute, _):
        await asyncio.gather(*batcher.submit([Row("t", name) for name in "abcd"]))
        return compute.batches

    assert batched(scenario, rows=2, wait=1e6) == [["a", "b"], ["c", "d"]]


def test_a_row_that_stays_alone_waits_for_the_time_given():
    async def scenario(batcher, _, __):
        started = time.monotonic()
        await asyncio.gather(*batcher.submit([Row("t")]))
        return time.monotonic() - started

    assert 0.1 <= batched(scenario, wait=0.1) < LONG / 2


def test_the_next_batch_gathers_while_one_is_computed():
    async def scenario(batcher, compute, _):
        compute.gate.clear()
        answers = batcher.submit([Row("t", "a")])
        await until(lambda: compute.batches)
        for name in "bcd":
            answers += batcher.submit([Row("t", name)])
            await asyncio.sleep(0.01)
        before = len(compute.batches)
        compute.gate.set()
        await asyncio.gather(*answers)
        return before, compute.batches

    assert batched(scenario) == (1, [["a"], ["b", "c", "d"]])


def test_the_oldest_goes_with_those_of_its_length():
    async def scenario(batcher, compute, _):
        lengths = {"long": 90, "short": 2, "longer": 120, "shorter": 1}
        rows = [Row("t" * length, name) for name, length in lengths.items()]
        await asyncio.gather(*batcher.submit(rows))
        return compute.batches

    assert batched(scenario, rows=2) == [["long", "longer"], ["short", "shorter"]]


def test_a_full_queue_refuses_and_takes_again_later():
    async def scenario(batcher, compute, metrics):
        compute.gate.clear()
        first = batcher.submit([Row("t", "a")])
        await until(lambda: compute.batches)
        waiting = batcher.submit([Row("t", "b")])
        with pytest.raises(batching.Full, match="no room for 2 more of 2"):
            batcher.submit([Row("t", "c")] * 2)  # all or none
        waiting += batcher.submit([Row("t", "d")])
        with pytest.raises(batching.Full):
            batcher.submit([Row("t", "e")])
        compute.gate.set()
        await asyncio.gather(*first, *waiting)
        await asyncio.gather(*batcher.submit([Row("t", "f")]))
        return compute.batches, metrics.total

    computed, total = batched(scenario, queue=2)

    assert computed == [["a"], ["b", "d"], ["f"]]
    assert (total["received"], total["answered"], total["refused"]) == (7, 4, 3)


@pytest.mark.parametrize("count", [0, 3])
def test_more_rows_than_the_queue_ever_holds_are_a_mistake(count):
    async def scenario(batcher, _, __):
        with pytest.raises(UsageError, match=f"{count} rows in a request, expected 1 to 2"):
            batcher.submit([Row("t")] * count)

    batched(scenario, queue=2)


def test_who_has_gone_is_not_computed():
    async def scenario(batcher, compute, metrics):
        compute.gate.clear()
        (during,) = batcher.submit([Row("t", "a")])
        await until(lambda: compute.batches)
        gone, stays = batcher.submit([Row("t", "b"), Row("t", "c")])
        gone.cancel()
        during.cancel()
        compute.gate.set()
        await stays
        return compute.batches, metrics.total

    computed, total = batched(scenario)

    assert computed == [["a"], ["c"]]
    assert (total["abandoned"], total["answered"]) == (2, 1)


def test_a_bug_meets_only_its_batch():
    async def scenario(batcher, compute, metrics):
        compute.gate = None  # not what it should be
        (met,) = await asyncio.gather(*batcher.submit([Row("t", "a")]))
        compute.gate = threading.Event()
        compute.gate.set()
        (well,) = await asyncio.gather(*batcher.submit([Row("t", "b")]))
        return met, well, metrics.total

    met, well, total = batched(scenario)

    assert isinstance(met, AttributeError)
    assert well.adapter == "b"
    assert (total["failed"], total["answered"]) == (1, 1)


def test_closing_answers_what_was_accepted_and_accepts_no_more():
    async def scenario(batcher, _, __):
        answers = batcher.submit([Row("t", name) for name in "abc"])
        batcher.close()
        with pytest.raises(batching.Full):
            batcher.submit([Row("t", "d")])
        return [told.adapter for told in await asyncio.gather(*answers)]

    assert batched(scenario, rows=2, wait=1e6) == ["a", "b", "c"]


def test_metrics_look_back_a_window_and_total_from_the_start():
    now = 100.0
    metrics = batching.Metrics(clock=lambda: now)

    def finish(*since):
        rows = [
            batching.Waiting(Row("t", "a"), at, SimpleNamespace(cancelled=lambda: False))
            for at in since
        ]
        metrics.batch(rows, [Reply("a", "v1")] * len(rows))

    now = 110.0
    finish(109.0)
    now = 150.0
    finish(*(150 - n / 1000 for n in range(1, 102)))
    now = 175.0

    told = metrics.read()

    assert told["since_start"]["answered"] == 102
    assert told["since_start"]["batches"] == 2
    assert (told["rows"], told["batches"], told["rows_per_batch"]) == (101, 1, 101)
    assert told["p50_ms"] == pytest.approx(51)
    assert told["p99_ms"] == pytest.approx(100)
    assert told["rows_per_s"] == pytest.approx(101 / 60)
    assert told["rows_by_adapter"] == {"a": 101}


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
    assert told["error"] == "the queue: has no room for 1 more of 1. Try again."
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
    assert [status for status, *_ in wrong] == [422, 422, 404]
    assert "has no adapter_config.json, expected a PEFT" in wrong[0][1]["error"]


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

    assert started == {"host": "127.0.0.1", "port": 1234, "access_log": False}


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
