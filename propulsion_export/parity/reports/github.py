"""The verdict for GitHub Actions: Markdown for the step summary, and annotations."""

import re
from collections.abc import Sequence

from propulsion_export.parity.reports.report import Check, ParityReport

# GitHub shows no more than 10 annotations of a level for a step; the last one counts the rest.
MOST_ANNOTATIONS = 10
_ICONS = {"passed": "\u2705", "failed": "\u274c", "not run": "\u26a0\ufe0f"}
# Characters with a meaning in Markdown or HTML, and $, which GitHub reads as mathematics.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~$&#!:@]")
_CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]+")


def to_markdown(report: ParityReport) -> str:
    """The step summary: the verdict, what was judged, every failed check, what did not run.

    Text from the report appears as written: characters that Markdown reads are entities, and line
    breaks and control characters become a space.
    """
    failed = [check for check in report.checks if not check.passed]
    not_run = [(entry.what, entry.reason) for entry in report.not_run]
    left_out = [(entry.what, entry.detail) for entry in report.coverage if not entry.covered]
    parts = [
        f"### {_ICONS[report.verdict]} Parity {report.verdict}: {_plain(report.artifact)}",
        _summary(report),
        _table(("Failed", "Adapter", "Found"), [(c.case, c.adapter, c.detail) for c in failed]),
        _table(("Not run", "Why"), not_run),
        _table(("Not covered", "Why"), left_out),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_annotations(report: ParityReport) -> list[str]:
    """Workflow commands: an error for each failed check, a warning for each that did not run.

    Of each level at most MOST_ANNOTATIONS, each a line of its own.
    """
    errors = [_about(check) for check in report.checks if not check.passed]
    warnings = [f"{entry.what}: {entry.reason}" for entry in report.not_run]
    failed, unknown = f"parity failed: {report.artifact}", f"parity not run: {report.artifact}"
    return [
        *(_command("error", failed, text) for text in _few(errors)),
        *(_command("warning", unknown, text) for text in _few(warnings)),
    ]


def _about(check: Check) -> str:
    return f"{check.case} of {check.adapter}: {check.detail}"


def _few(texts: list[str]) -> list[str]:
    if len(texts) <= MOST_ANNOTATIONS:
        return texts
    kept = texts[: MOST_ANNOTATIONS - 1]
    return [*kept, f"and {len(texts) - len(kept)} more, see the report"]


def _command(level: str, title: str, message: str) -> str:
    """A workflow command, escaped as @actions/core does it."""
    return f"::{level} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _summary(report: ParityReport) -> str:
    judged = f"{_plain(report.kind)} in {_plain(report.dtype)} with {_plain(report.runner)}"
    if not report.checks:
        return f"Nothing was compared, so nothing is known about this artifact ({judged})."
    held = sum(check.passed for check in report.checks)
    text = f"{held} of {len(report.checks)} checks hold on {report.inputs:,} inputs ({judged})"
    if report.passed and report.margin is not None:
        text += f"; at worst {1 - report.margin:.0%} of the allowed error is used"
    return f"{text}."


def _table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [headers, ("---",) * len(headers), *(tuple(map(_plain, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Markdown that shows `text` itself, on one line."""
    line = " ".join(_CONTROL.sub(" ", text).split())
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)
