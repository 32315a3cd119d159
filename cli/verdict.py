"""A parity verdict as an exit code."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from propulsion_export.parity.reports.report import ParityReport

_CODES = {"passed": 0, "failed": 1, "not run": 3}


def exit_code(report: "ParityReport") -> int:
    """0 passed, 1 failed, 3 when nothing could be run."""
    return _CODES[report.verdict]
