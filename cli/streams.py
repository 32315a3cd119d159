"""Standard output and error: closed, full, without a reader, or unable to show a character."""

import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

from propulsion_export.errors import UsageError

READER_GONE = 141  # what a shell reports for a program that SIGPIPE ended


class ReaderGone(Exception):
    """Nobody reads the output any more, as in `... | head -1`."""


def prepare_streams(arguments: Sequence[str]) -> None:
    """Make both streams safe to write to, whatever they are connected to.

    What a terminal cannot show becomes a question mark. A stream that is closed leads nowhere
    instead: otherwise the next file that is opened would take its number, and receive what
    libraries print.

    Raises:
        UsageError: standard output is closed and the command would print its result there.
    """
    closed = sys.stdout is None
    for descriptor in range(3):
        _occupy(descriptor)
    sys.stdout, sys.stderr = (stream or _nowhere() for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if closed and ("--json" in arguments or not {"-q", "--quiet"} & set(arguments)):
        raise UsageError(
            "standard output: is closed, expected a place for the result",
            remedy="Redirect it, to /dev/null if nobody reads it.",
        )


def print_result(text: str, *, nl: bool = True) -> None:
    """Print on standard output, at once.

    Raises:
        ReaderGone: it is a pipe that nobody reads any more.
        UsageError: it cannot be written to.
    """
    with broken_pipes_as_ours():
        try:
            click.echo(text, nl=nl)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(
                f"standard output: {error.strerror}, so the result was not printed"
            ) from error


def print_note(text: str) -> None:
    """Print on standard error; where that fails the note is lost, the work goes on."""
    with suppress(OSError):
        click.echo(text, err=True)


@contextmanager
def broken_pipes_as_ours() -> Iterator[None]:
    """Raise `ReaderGone` where click would exit with 1, the code of a failed comparison.

    Raises:
        RuntimeError: another pipe broke, such as a connection, which is not the reader's doing.
    """
    try:
        yield
    except BrokenPipeError as error:
        if _is_read(sys.stdout):
            raise RuntimeError("a connection broke") from error
        raise ReaderGone from error


def forget_unwritten() -> None:
    """Drop what could not be written: at its end Python would try again, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_read(stream: Any) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # what is reported without being asked for: errors
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _occupy(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - for the whole process
