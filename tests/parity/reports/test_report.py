"""The verdict never calls something passed that did not run, and its JSON is JSON."""

import json
import math

import pytest

from propulsion_export.parity.comparison import DECADES, OutputErrors
from propulsion_export.parity.reports.report import Check, NotRun, ParityReport


def errors(error=1e-7, allowed=4e-7, **changes):
    values = {
        "output": "logits",
        "error": error,
        "rms": error / 4,
        "reference_error": 1e-7,
        "allowed": allowed,
        "scale": 2.0,
        "worst": "[0, 0]: oracle 1, candidate 1",
        "elements": 32,
        "non_finite": int(math.isnan(error)),
        "histogram": (0,) * (len(DECADES) - 1),
        "reference_histogram": (0,) * (len(DECADES) - 1),
    }
    return OutputErrors(**(values | changes))


def check(*outputs, case="parity"):
    return Check(case, "legal", all(output.passed for output in outputs), "detail", outputs)


def report(*checks, not_run=()):
    return ParityReport(
        artifact="out", kind="onnx", dtype="float32", runner="onnxruntime", inputs=16, seed=0,
        checks=checks, not_run=not_run, tools={"torch": "2.13"},
    )  # fmt: skip


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ((), "not run"),
        ((check(errors()),), "passed"),
        ((check(errors()), check(errors(error=1.0))), "failed"),
        ((check(errors(error=math.nan)),), "failed"),
        ((check(errors()), Check("switching", "base", False, "changed")), "failed"),
    ],
    ids=["nothing", "within", "one-beyond", "not-a-number", "a-check-without-numbers"],
)
def test_verdict_is_passed_only_when_something_ran_and_all_of_it_holds(checks, verdict):
    made = report(*checks, not_run=(NotRun("engine", "there is no GPU"),))

    assert made.verdict == verdict
    assert made.passed == (verdict == "passed")


def test_margin_is_the_smallest_of_all_outputs():
    made = report(check(errors(), errors(error=3e-7)), check(errors(error=2e-7)))

    assert made.margin == pytest.approx(0.25)
    assert report().margin is None


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_margin_is_not_a_number_when_any_is(order):
    outputs = [errors(error=math.nan), errors()][::order]

    assert math.isnan(report(check(*outputs)).margin)


@pytest.mark.parametrize(
    "worst",
    [errors(error=math.nan), errors(allowed=0.0), errors(error=math.inf), errors(allowed=math.nan)],
    ids=["error-nan", "margin-minus-infinity", "error-infinite", "allowed-nan"],
)
def test_json_has_no_numbers_that_json_does_not_know(worst):
    content = strict(report(check(worst, errors())).to_json())

    assert content["verdict"] == "failed"
    assert content["checks"][0]["outputs"][0]["passed"] is False
    assert content["margin"] in ("nan", "-inf")


def test_json_holds_all_that_was_found():
    content = strict(report(check(errors()), not_run=(NotRun("engine", "no GPU"),)).to_json())

    assert content["schema_version"] == 1
    assert content["verdict"] == "passed"
    assert content["margin"] == pytest.approx(0.75)
    assert content["factor"] == 4
    assert content["histogram_decades"] == list(DECADES)
    assert content["not_run"] == [{"what": "engine", "reason": "no GPU"}]
    assert content["tools"] == {"torch": "2.13"}
    (output,) = content["checks"][0]["outputs"]
    assert output["margin"] == pytest.approx(0.75)
    assert output["passed"] is True
    assert output["error"] == 1e-7


def test_json_of_a_report_with_nothing_run_says_so():
    content = strict(report(not_run=(NotRun("engine", "no GPU"),)).to_json())

    assert content["verdict"] == "not run"
    assert content["margin"] is None
