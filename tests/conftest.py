"""Fixtures for all tests: tiny models, and exports of them; each module says what it gives."""

import gc
import logging
import sys

import pytest

pytest.register_assert_rewrite("outputs", "reference_server", "written_artifacts")
pytest_plugins = ["shared", "tiny_models", "worlds", "genai_toys"]


def pytest_collection_finish():
    """Collect garbage less often, and keep torch's trace log out of the reports of failures.

    A trace makes millions of objects, hardly one of them in a cycle. pytest attaches its handlers
    to every logger that does not propagate, and torch writes that log once it has a handler.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture
def many_turns():
    """Let threads take turns often: else who changes hardly gets one among many who ask."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(usual)
