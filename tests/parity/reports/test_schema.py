"""The published schema holds for every kind of report, and for nothing else."""

import copy
import json
import math

import jsonschema
import pytest

from propulsion_export.cli import main
from propulsion_export.parity.comparison import DECADES, OutputErrors
from propulsion_export.parity.reports.report import (
    Check,
    Coverage,
    NotRun,
    ParityReport,
    Price,
    Rounding,
)
from propulsion_export.parity.reports.schema import SCHEMA_FILE, schema_text, to_schema

BINS = (0,) * (len(DECADES) - 1)
NAN = OutputErrors("logits", math.nan, math.nan, 0.0, 0.0, 2.0, "[0]", 4, 4, BINS, BINS)
FULL = ParityReport(
    artifact="onnx/int4",
    kind="onnx",
    dtype="float32",
    runner="onnxruntime",
    inputs=16,
    seed=None,
    checks=(Check("parity", "base", False, "NaN", (NAN,), effect_over_error=math.inf),),
    not_run=(NotRun("weights", "of an engine"),),
    tools={"torch": "2.13.0"},
    coverage=(Coverage("long rows", False, "--thorough"),),
    rounding=(Rounding("base", "logits", 0.5, None, 2.0),),
    price=(Price("base", "logits", 16, kl=0.25),),
)


def closed(schema):
    """The schema with every object closed to fields that it does not name."""
    if isinstance(schema, dict):
        inner = {name: closed(value) for name, value in schema.items()}
        return inner | ({"additionalProperties": False} if "properties" in inner else {})
    return [closed(one) for one in schema] if isinstance(schema, list) else schema


def errors_in(value, schema=None):
    validator = jsonschema.Draft202012Validator(closed(schema or to_schema()))
    return [error.message for error in validator.iter_errors(value)]


def test_the_packaged_file_is_what_the_dataclasses_say():
    assert SCHEMA_FILE.read_text() == schema_text(), (
        "run: python -m propulsion_export.parity.reports.schema"
    )


def test_it_is_a_schema_and_every_field_is_described():
    schema = to_schema()
    jsonschema.Draft202012Validator.check_schema(schema)

    for name, field in schema["properties"].items():
        assert field.get("description"), name


@pytest.mark.parametrize("report", [FULL, ParityReport("a", "merged", "float16", "torch", 0, 1)])
def test_reports_with_everything_and_with_nothing_are_valid(report):
    assert errors_in(json.loads(report.to_json())) == []


def without(value, *path):
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]


@pytest.mark.parametrize(
    "path",
    [
        ("verdict",),
        ("schema_version",),
        ("checks", 0, "passed"),
        ("checks", 0, "outputs", 0, "rms"),
    ],
)
def test_a_lost_field_is_not_valid(path):
    value = json.loads(FULL.to_json())
    without(value, *path)

    assert errors_in(value) == [f"{path[-1]!r} is a required property"]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("schema_version", 2),
        ("verdict", "skipped"),
        ("margin", "much"),
        ("inputs", "16"),
        ("seed", 0.5),
        ("tools", {"torch": 2}),
        ("checks", [{}]),
        ("unknown", 1),
    ],
)
def test_a_field_of_another_kind_is_not_valid(field, wrong):
    value = copy.deepcopy(json.loads(FULL.to_json()))
    value[field] = wrong

    assert errors_in(value)


def test_the_command_prints_it(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["parity", "--schema"])

    assert exit.value.code == 0
    assert json.loads(capsys.readouterr().out) == to_schema()
