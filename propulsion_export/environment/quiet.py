"""Silence the libraries that we call; no other module does.

They print banners, progress bars and version-drift notes on stdout, stderr and through `logging`
and `warnings`. Standard output belongs to `--json`, and a known failure is one line.
"""

import contextlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "transformers",
    "torch.onnx",
    "torch.export",
    "onnxscript",
    "onnx_ir",
    "peft",
    "datasets",
    "huggingface_hub",
)
# Imported by transformers where they are installed; they tell of kernels that nobody asked for.
_OPTIONAL = ("torchao", "bitsandbytes", "torch.utils._pytree")
_ONE_AT_A_TIME = threading.RLock()


def silence_optional_packages() -> None:
    """Let packages that transformers imports by itself report errors only, from now on."""
    for name in _OPTIONAL:
        logging.getLogger(name).setLevel(logging.ERROR)


def _free_in_child() -> None:
    """In a fork, undo what another thread did there, which is not there to undo it."""
    global _ONE_AT_A_TIME
    if _ONE_AT_A_TIME.acquire(blocking=False):
        _ONE_AT_A_TIME.release()
        return
    _ONE_AT_A_TIME = threading.RLock()
    sys.stdout = sys.__stdout__


os.register_at_fork(after_in_child=_free_in_child)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries inside the block; exceptions pass through untouched.

    Several threads wait for each other: the settings it changes belong to the whole process.
    """
    with _ONE_AT_A_TIME, _silence():
        yield


@contextmanager
def _silence() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    environment = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            _transformers_progress_off(),
            _datasets_progress_off(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def quiet_while_tracing() -> Iterator[None]:
    """`quiet`, and no log record below CRITICAL from anywhere.

    torch.onnx warns about its own registry on a logger that sets its level when it is imported.
    """
    with quiet():
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def quiet_while_training() -> Iterator[None]:
    """Silence transformers alone: a caller's callback may print and warn inside the block.

    A head that is not in the checkpoint needs no warning: training is there to make one.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), _transformers_progress_off():
            # PEFT uses the deprecated name. Remove when it no longer does (0.21.2 does).
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
            )
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def _transformers_progress_off() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


@contextmanager
def _datasets_progress_off() -> Iterator[None]:
    datasets = sys.modules.get("datasets")  # importing it takes a second, and few calls need it
    was_on = datasets is not None and not datasets.are_progress_bars_disabled()
    if datasets is not None and was_on:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if datasets is not None and was_on:
            datasets.enable_progress_bars()
