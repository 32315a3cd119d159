"""A parity verdict as one line of text."""

from propulsion_export.parity.reports.report import ParityReport


def verdict_line(report: ParityReport) -> str:
    """One line: the verdict, and what it is based on or why there is none."""
    if report.verdict == "not run":
        reasons = "; ".join(f"{item.what}: {item.reason}" for item in report.not_run)
        return f"parity: not run ({reasons})"
    failed = [check for check in report.checks if not check.passed]
    if failed:
        first = failed[0]
        return (
            f"parity: FAILED, {len(failed)} of {len(report.checks)} checks; "
            f"{first.case} of {first.adapter}: {first.detail}"
        )
    margin = report.margin
    left = f", at least {margin:.0%} of the allowed error left" if margin is not None else ""
    return (
        f"parity: passed, {len(report.checks)} checks on {report.inputs} inputs in {report.runner}"
        f"{left}"
    )
