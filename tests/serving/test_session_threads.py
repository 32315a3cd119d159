"""Threads share a session."""

import sys
import threading
from dataclasses import replace

import pytest
from session_inputs import TEXTS

from propulsion_export.serving import generation as generation_module
from propulsion_export.serving import texts as texts_module
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session


class Borrowed:
    """A tokenizer that fails as some versions do when two threads are in it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.inside = tokenizer, threading.Lock()

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **options):
        if not self.inside.acquire(blocking=False):
            raise RuntimeError("Already borrowed")
        try:
            return self.tokenizer(*arguments, **options)
        finally:
            self.inside.release()


def in_threads(count, work):
    """Run `work(number)` in threads that start together; what they raised."""
    raised, barrier = [], threading.Barrier(count)

    def run(number):
        barrier.wait()
        try:
            work(number)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("kind", ["banked", "llama"])
def test_one_thread_at_a_time_is_in_the_tokenizer(kind, banked, generative, monkeypatch):
    module = texts_module if kind == "banked" else generation_module
    read = module.read_serving_tokenizer
    opened_times = []

    def counting(directory):
        opened_times.append(directory)
        return Borrowed(read(directory))

    directory = banked if kind == "banked" else generative(kind).directory
    monkeypatch.setattr(module, "read_serving_tokenizer", counting)
    session = Session(directory)
    settings = None if kind == "banked" else Settings(new_tokens=1)
    texts = [" ".join(["ba be bi"] * 40)] * 6 if kind == "banked" else TEXTS

    raised = in_threads(8, lambda _: [session(texts, settings=settings) for _ in range(6)])

    assert raised == []
    assert len(opened_times) == 1

    # The twin: without the lock it would have been noticed.
    class Open:
        def __enter__(self): ...
        def __exit__(self, *_): ...

    model = session._model
    model._text = replace(model._text, one_at_a_time=Open())
    assert {str(e) for e in in_threads(8, lambda _: [
        session(texts, settings=settings) for _ in range(20)
    ])} == {"Already borrowed"}  # fmt: skip


def test_threads_get_what_one_gets(opened, generative):
    session, made = opened("banked"), generative("llama")
    settings = Settings(new_tokens=4)
    names = ["three", "five", "base", "five"] * 2
    wanted = [reply.prediction for reply in session(TEXTS, names)]
    written = [r.prediction for r in made.session(TEXTS[:2], ["one", "two"], settings=settings)]

    def work(_):
        for _ in range(5):
            assert [reply.prediction for reply in session(TEXTS, names)] == wanted
            replies = made.session(TEXTS[:2], ["one", "two"], settings=settings)
            assert [reply.prediction for reply in replies] == written

    assert in_threads(6, work) == []


def test_generating_in_threads_leaves_standard_output_alone(generative):
    session, before = generative("llama").session, sys.stdout

    assert in_threads(6, lambda _: session(TEXTS, settings=Settings(new_tokens=1))) == []

    assert sys.stdout is before
