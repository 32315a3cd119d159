import json

import pytest

from propulsion_export.environment.json_text import to_json

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("non_finite", "expected"),
    [
        pytest.param(str, {"a": ["nan", ["inf", 1.5]], "b": "-inf"}, id="strings"),
        pytest.param(lambda _: None, {"a": [None, [None, 1.5]], "b": None}, id="null"),
    ],
)
def test_numbers_that_are_not_finite_are_replaced_at_any_depth(non_finite, expected):
    text = to_json({"a": [NAN, (INFINITY, 1.5)], "b": -INFINITY}, non_finite=non_finite)

    assert json.loads(text) == expected
    assert "\n" not in text


def test_text_is_indented_when_asked_for():
    assert to_json({"a": [1]}, non_finite=str, indent=2) == '{\n  "a": [\n    1\n  ]\n}'
