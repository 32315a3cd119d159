"""What every command shares: where text, progress and JSON go, and the options that say so.

People's text goes to stdout, progress and notes to stderr; with `--json` stdout carries one JSON
object and nothing else.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")
_LEAST_GROWTH = 0.05


@dataclass(frozen=True)
class Console:
    """Where a command's words go."""

    json: bool
    quiet: bool

    def result(self, value: dict[str, Any], text: str) -> None:
        """The outcome, as JSON or as text."""
        if self.json:
            click.echo(json.dumps(_finite(value), allow_nan=False))
        elif not self.quiet:
            click.echo(text)

    def note(self, text: str) -> None:
        """Something worth knowing that is not the outcome."""
        if not self.quiet:
            click.echo(text, err=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        """Rows under their columns, as wide as they need when nobody watches."""
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
    def progress(self) -> Iterator[Callable[[float, str], None]]:
        """A bar on a terminal, lines elsewhere (of counted steps some), nothing when quiet."""
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
    the last line; every other message is news.
    """

    def __init__(self) -> None:
        self.last = ""
        self.share = -1.0

    def report(self, share: float, message: str) -> None:
        counts = re.fullmatch(r"\D*\d+ of \d+", message)
        if message == self.last or (counts and share < self.share + _LEAST_GROWTH):
            return
        self.last, self.share = message, share
        click.echo(f"[{share:4.0%}] {message}", err=True)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add `--json`, `-q` and `-v`; the command gets a `console` instead."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress and no text.")
    @click.option("-v", "--verbose", is_flag=True, help="Show the traceback of a known failure.")
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> R:
        del verbose  # read by the program itself, see app.main
        return function(*args, console=Console(as_json, quiet), **options)

    return command


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
    """Bytes as people say them: `1.4 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
