"""Fixtures for all tests: tiny models, and exports of them; each module says what it gives."""

import gc
import logging

pytest_plugins = ["shared", "tiny_models", "worlds"]


def pytest_collection_finish():
    """Trace models faster: with less garbage collection, and without torch's log of the trace.

    A trace makes millions of objects, hardly one of them in a cycle. pytest 9 attaches its handlers
    to loggers that do not propagate, and torch formats megabytes for a trace logger with a handler.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    logging.getLogger("torch.__trace").propagate = True
