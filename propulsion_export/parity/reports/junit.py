"""The verdict as JUnit XML, which CI servers show test by test."""

import re
from xml.etree import ElementTree

from propulsion_export.parity.reports.report import Check, ParityReport

# What XML 1.0 cannot hold, not even escaped (section 2.2, production 2, "Char").
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: ParityReport) -> str:
    """One test case per check, and a skipped one for each entry that could not run.

    Characters that XML cannot hold become U+FFFD.
    """
    failures = sum(not check.passed for check in report.checks)
    counts = {
        "tests": str(len(report.checks) + len(report.not_run)),
        "failures": str(failures),
        "errors": "0",
        "skipped": str(len(report.not_run)),
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "parity"} | counts)
    _add_properties(suite, report)
    for check in report.checks:
        case = _add_case(suite, report, f"{check.case} {check.adapter}")
        if not check.passed:
            message = {"message": replace_forbidden(check.detail), "type": check.case}
            ElementTree.SubElement(case, "failure", message).text = _explanation(check)
    for not_run in report.not_run:
        case = _add_case(suite, report, not_run.what)
        ElementTree.SubElement(case, "skipped", {"message": replace_forbidden(not_run.reason)})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def replace_forbidden(text: str) -> str:
    """`text` with U+FFFD for control characters and lone surrogates, which no XML can hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def _add_properties(suite: ElementTree.Element, report: ParityReport) -> None:
    values = {
        "verdict": report.verdict,
        "artifact": report.artifact,
        "kind": report.kind,
        "dtype": report.dtype,
        "runner": report.runner,
        "inputs": str(report.inputs),
        "seed": "" if report.seed is None else str(report.seed),
    } | {f"version of {tool}": version for tool, version in report.tools.items()}
    values |= {f"price of {one.adapter}, {one.output}": str(one) for one in report.price}
    values |= {f"rounding of {one.adapter}, {one.output}": str(one) for one in report.rounding}
    values |= {
        f"coverage of {one.what}": ("" if one.covered else "not covered: ") + one.detail
        for one in report.coverage
    }
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in values.items():
        attributes = {"name": replace_forbidden(name), "value": replace_forbidden(value)}
        ElementTree.SubElement(properties, "property", attributes)


def _add_case(suite: ElementTree.Element, report: ParityReport, name: str) -> ElementTree.Element:
    attributes = {
        "classname": replace_forbidden(f"{report.artifact}/{report.runner}"),
        "name": replace_forbidden(name),
    }
    return ElementTree.SubElement(suite, "testcase", attributes)


def _explanation(check: Check) -> str:
    lines = [
        f"{errors.output}: error {errors.error:.3g}, allowed {errors.allowed:.3g}, "
        f"PyTorch itself {errors.reference_error:.3g}, worst {errors.worst}"
        for errors in check.outputs
        if not errors.passed
    ]
    return replace_forbidden("\n".join([check.detail, *lines]))
