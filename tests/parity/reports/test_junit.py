"""JUnit XML: CI servers count what ran, what failed and what was skipped."""

import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.parity.comparison import DECADES, OutputErrors
from propulsion_export.parity.reports.junit import to_junit
from propulsion_export.parity.reports.report import Check, Coverage, NotRun, ParityReport

EMPTY = (0,) * (len(DECADES) - 1)
ERRORS = OutputErrors(
    "logits", 1e-7, 4e-8, 2e-7, 8e-7, 5.0, "[0, 3]: oracle 1, candidate 2", 48, 0, EMPTY, EMPTY
)
HELD = Check("parity", "tenant-a", True, "within", (ERRORS,))
BROKEN = Check("effect", "tenant-b", False, "the scales change nothing")
NOT_RUN = NotRun("the engine", "no GPU here")


def report_with(checks, not_run=()):
    return ParityReport("models/router", "onnx", "float16", "a runner", 16, 7, checks, not_run)


def parsed(report):
    return ElementTree.fromstring(to_junit(report).encode())


@pytest.mark.parametrize(
    ("checks", "not_run", "counts"),
    [
        pytest.param((), (), ("0", "0", "0"), id="nothing"),
        pytest.param((HELD,), (), ("1", "0", "0"), id="passed"),
        pytest.param((HELD, BROKEN), (), ("2", "1", "0"), id="failed"),
        pytest.param((HELD, BROKEN, BROKEN), (NOT_RUN,), ("4", "2", "1"), id="all-kinds"),
        pytest.param((), (NOT_RUN, NOT_RUN), ("2", "0", "2"), id="not-run"),
    ],
)
def test_the_counts_are_those_of_the_elements(checks, not_run, counts):
    root = parsed(report_with(checks, not_run))

    for element in (root, *root.iter("testsuite")):
        assert (element.get("tests"), element.get("failures"), element.get("skipped")) == counts
    kinds = ("testcase", "failure", "skipped")
    assert tuple(str(len(list(root.iter(kind)))) for kind in kinds) == counts


def test_a_check_that_holds_is_a_case_with_nothing_in_it():
    [case] = parsed(report_with((HELD,))).iter("testcase")

    assert case.attrib == {"classname": "models/router/a runner", "name": "parity tenant-a"}
    assert list(case) == []


def test_a_check_that_fails_says_what_was_found():
    [case] = parsed(report_with((BROKEN,))).iter("testcase")
    [failure] = case

    assert failure.tag == "failure"
    assert failure.attrib == {"message": "the scales change nothing", "type": "effect"}
    assert failure.text == "the scales change nothing"


@pytest.mark.parametrize("error", [9e-7, math.nan, math.inf])
def test_a_failure_names_the_outputs_that_failed_and_no_others(error):
    failed = replace(ERRORS, output="pooled", error=error)
    check = Check("parity", "tenant-a", False, "out of tolerance", (ERRORS, failed))

    [failure] = parsed(report_with((check,))).iter("failure")

    assert failure.text.splitlines() == [
        "out of tolerance",
        f"pooled: error {error:.3g}, allowed 8e-07, PyTorch itself 2e-07, "
        "worst [0, 3]: oracle 1, candidate 2",
    ]


def test_what_could_not_run_is_skipped_with_its_reason():
    [case] = parsed(report_with((), (NOT_RUN,))).iter("testcase")
    [skipped] = case

    assert case.get("name") == "the engine"
    assert (skipped.tag, skipped.get("message")) == ("skipped", "no GPU here")


def test_the_properties_say_what_was_judged():
    report = replace(report_with((HELD,)), tools={"torch": "2.13.0"})
    found = {entry.get("name"): entry.get("value") for entry in parsed(report).iter("property")}

    assert found == {
        "verdict": "passed",
        "artifact": "models/router",
        "kind": "onnx",
        "dtype": "float16",
        "runner": "a runner",
        "inputs": "16",
        "seed": "7",
        "version of torch": "2.13.0",
    }


@given(text=st.text(st.characters(exclude_categories=[]), max_size=20))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_any_text_gives_xml_that_parses(text):
    errors = replace(ERRORS, output=text, worst=text, error=1.0)
    checks = (Check("parity", text, False, text, (errors,)),)
    report = ParityReport(
        text, text, text, text, 1, None, checks, (NotRun(text, text),), {text: text}
    )

    root = parsed(report)

    [failure] = root.iter("failure")
    assert len(failure.get("message")) == len(text)


def test_a_control_character_leaves_a_sign_that_it_was_there():
    check = replace(BROKEN, detail="a\x1b[31m<b>\ud800&")

    [failure] = parsed(report_with((check,))).iter("failure")

    assert failure.get("message") == "a\ufffd[31m<b>\ufffd&"


def test_what_was_covered_is_a_property_of_the_suite():
    report = report_with((HELD,))
    coverage = (Coverage("33 rows", True, "33 x 7"), Coverage("far rows", False, "too long"))

    [properties] = parsed(replace(report, coverage=coverage)).iter("properties")

    found = {one.get("name"): one.get("value") for one in properties}
    assert found["coverage of 33 rows"] == "33 x 7"
    assert found["coverage of far rows"] == "not covered: too long"
