"""Where a parity verdict goes in a job of GitHub Actions."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from propulsion_export.errors import UsageError

from .streams import print_note

if TYPE_CHECKING:
    from propulsion_export.parity.reports.report import ParityReport


def summary_file(given: Path | None) -> Path | None:
    """The file for the Markdown summary: the given one, or the job's own; None for none.

    Raises:
        UsageError: the given file is a directory.
    """
    if given is not None and given.is_dir():
        raise UsageError(f"{given}: is a directory, expected a file", remedy="Name a file in it.")
    own = os.environ.get("GITHUB_STEP_SUMMARY") if _in_github_actions() else None
    return given or (Path(own) if own else None)


def tell_github(verdict: "ParityReport", summary: Path | None) -> None:
    """Append the verdict to the summary file; in a job of GitHub Actions, annotate too.

    Annotations are lines on stderr, which GitHub reads as it reads stdout, so that `--json` leaves
    one JSON object on stdout.
    """
    from propulsion_export.parity.reports.github import to_annotations, to_markdown

    if summary is not None:
        summary.parent.mkdir(parents=True, exist_ok=True)
        with summary.open("a", encoding="utf-8") as file:
            file.write(f"{to_markdown(verdict)}\n")
    if _in_github_actions():
        for line in to_annotations(verdict):
            print_note(line)


def _in_github_actions() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"
