"""Output of every command: text, progress and JSON, and the options that choose between them.

Text for people goes to stdout, progress and notes to stderr; with `--json`, stdout carries one JSON
object and nothing else.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from propulsion_export.environment.json_text import to_json

from .streams import print_note, print_result

P = ParamSpec("P")
R = TypeVar("R")
_LEAST_GROWTH = 0.05


@dataclass(frozen=True)
class Console:
    """Where a command's output goes."""

    json: bool
    quiet: bool
    verbose: bool = False

    def result(self, value: dict[str, Any], text: str) -> None:
        """Print the result, as JSON (null for NaN and infinity) or as text."""
        if self.json:
            print_result(to_json(value, non_finite=lambda _: None))
        elif not self.quiet:
            print_result(text)

    def note(self, text: str) -> None:
        """Print something worth knowing that is not the result, on stderr."""
        if not self.quiet:
            print_note(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        """Rows under their column names; up to 160 characters wide where there is no terminal."""
        import io

        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        out = io.StringIO()
        width = None if sys.stdout.isatty() else 160
        RichConsole(file=out, width=width, markup=False, highlight=False).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    @contextmanager
    def stages(self) -> Iterator[None]:
        """With -v, print where the time of the block went, on stderr, also if it fails."""
        from propulsion_export.environment.stages import measured

        with measured() as stages:
            try:
                yield
            finally:
                if self.verbose:
                    print_note("\n".join(stages.lines()))

    @contextmanager
    def progress(self) -> Iterator[Callable[[float, str], None]]:
        """Show a bar on a terminal, lines elsewhere (not for every step), nothing when quiet."""
        if self.quiet:
            yield lambda share, message: None
        elif sys.stderr.isatty():
            with _bar() as update:
                yield update
        else:
            yield _Lines().report


class _Lines:
    """Progress as lines on stderr, for logs.

    A message that only counts (`step 7 of 900`) is left out unless the share has grown by 5 % since
    the last line; every other message is printed.
    """

    def __init__(self) -> None:
        self.last = ""
        self.share = -1.0

    def report(self, share: float, message: str) -> None:
        counts = re.fullmatch(r"\D*\d+ of \d+", message)
        if message == self.last or (counts and share < self.share + _LEAST_GROWTH):
            return
        self.last, self.share = message, share
        print_note(f"[{share:4.0%}] {message}")


def console_options(function: Callable[Concatenate[Console, P], R]) -> Callable[P, R]:
    """Add `--json`, `-q` and `-v` to a command, whose first parameter is a console."""

    @_kept_flag("--json", "as_json", help="One JSON object on stdout.")
    @_kept_flag("-q", "--quiet", help="No progress and no text.")
    @_kept_flag("-v", "--verbose", help="Show the traceback of a known failure, and timings.")
    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        kept = click.get_current_context().meta
        console = Console(*(kept[f"{__name__}.{name}"] for name in ("as_json", "quiet", "verbose")))
        return function(console, *args, **kwargs)

    return command


def _kept_flag(*names: str, help: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A flag that is kept in click's context and not passed to the command."""
    return click.option(*names, is_flag=True, callback=_keep, expose_value=False, help=help)


def _keep(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[f"{__name__}.{parameter.name}"] = value


@contextmanager
def _bar() -> Iterator[Callable[[float, str], None]]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, message: bar.update(task, completed=share, description=message)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def human_size(count: int) -> str:
    """Bytes in decimal units, such as `1.4 MB`."""
    from rich.filesize import decimal

    return decimal(count)
