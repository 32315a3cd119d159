"""Requests of the reference server are batched, and each row gets its own answer."""

import http.client
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from reference_server import (
    LONG,
    TEXTS,
    Gated,
    Row,
    ask,
    check_right,
    predict,
    server,
    serving,
    wait_for,
)

from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError


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
