import logging
import os
import sys
import threading
import time
import warnings

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from propulsion_export.environment.quiet import quiet, quiet_while_tracing

LOGGERS = ("transformers", "torch.onnx", "onnxscript", "peft", "datasets")


def state():
    return (
        {name: logging.getLogger(name).level for name in LOGGERS},
        os.environ.copy(),
        list(warnings.filters),
        sys.stdout,
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
        logging.root.manager.disable,
    )


def chatter():
    print("a banner")
    warnings.warn("version drift", UserWarning, stacklevel=1)
    for name in LOGGERS:
        logging.getLogger(name).warning("a note")


@pytest.fixture
def heard(caplog):
    """What the loggers let through, including those that tell their parents nothing."""
    for name in LOGGERS:
        logging.getLogger(name).addHandler(caplog.handler)
    yield caplog
    for name in LOGGERS:
        logging.getLogger(name).removeHandler(caplog.handler)


def test_libraries_say_nothing_inside(capsys, heard):
    with quiet():
        chatter()
        assert not transformers_logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled()

    assert capsys.readouterr().out == ""
    assert heard.messages == []


def test_without_it_they_would_have_been_heard(capsys, heard):
    with pytest.warns(UserWarning, match="version drift"):
        chatter()

    assert capsys.readouterr().out == "a banner\n"
    assert heard.messages


def test_their_errors_are_still_heard(heard):
    with quiet():
        logging.getLogger("transformers").error("broken")

    assert "broken" in heard.messages


def test_while_tracing_their_errors_are_not_heard_either(heard):
    before = state()

    with quiet_while_tracing():
        logging.getLogger("torch.onnx").error("registry")

    assert heard.messages == []
    assert state() == before


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("progress", [True, False])
def test_afterwards_everything_is_as_before(monkeypatch, error, progress):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    was_on = transformers_logging.is_progress_bar_enabled()
    getattr(transformers_logging, f"{'en' if progress else 'dis'}able_progress_bar")()
    logging.getLogger("peft").setLevel(logging.INFO)
    before = state()

    def work():
        with quiet():
            assert state() != before
            if error:
                raise error

    try:
        if error:
            with pytest.raises(error):
                work()
        else:
            work()
        assert state() == before
    finally:
        logging.getLogger("peft").setLevel(logging.NOTSET)
        getattr(transformers_logging, f"{'en' if was_on else 'dis'}able_progress_bar")()


def test_it_can_be_nested(capsys):
    before = state()

    with quiet():
        with quiet():
            print("inner")
        print("outer")

    assert state() == before
    assert capsys.readouterr().out == ""


def test_standard_error_is_left_alone(capsys):
    """Progress of ours goes there, and so does a crash."""
    with quiet():
        print("ours", file=sys.stderr)

    assert capsys.readouterr().err == "ours\n"


def test_two_threads_are_quiet_one_after_the_other_and_nothing_stays_changed():
    before, together, at_once = state(), threading.Barrier(4), []

    def work():
        together.wait()
        for _ in range(50):
            with quiet():
                at_once.append(1)
                time.sleep(0)
                assert len(at_once) == 1
                at_once.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert at_once == []
    assert state() == before


def test_quiet_inside_quiet_does_not_wait_for_itself():
    with quiet(), quiet():
        chatter()
