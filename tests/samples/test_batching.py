"""The reference server's batcher alone, without a socket or a model."""

import asyncio
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export import Reply
from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError

SAMPLES = Path(__file__).parents[2] / "samples"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SAMPLES)
    batching = import_module("batching")

Row, Limits = batching.Row, batching.Limits
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


def test_a_row_of_nan_is_told_alone():
    class Lost(Known):
        def __call__(self, texts, adapter):
            replies = super().__call__(texts, adapter)
            return [
                replace(
                    one, outputs={"logits": np.array([1, np.nan if one.adapter == "two" else 2])}
                )
                for one in replies
            ]

    one, two, again = batching.answer(Lost(), [Row("a", "one"), Row("b", "two"), Row("c", "one")])

    assert (one.prediction, again.prediction) == ({"label": "a"}, {"label": "c"})
    assert type(two) is ArtifactError
    assert str(two) == "the adapter 'two' computes NaN or infinity for this text"


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
        with pytest.raises(batching.Full, match="holds 1 of 2 rows, no room for 2 more"):
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
