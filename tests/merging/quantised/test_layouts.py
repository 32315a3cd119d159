import pytest

from propulsion_export.errors import BaseModelError
from propulsion_export.merging.quantised.layouts import LAYOUTS, find_layout, with_plain


def test_each_method_in_the_table_is_found_by_its_own_module_alone():
    for method, _ in LAYOUTS:
        settings = {"quant_method": method, "bits": 4}

        found = [name for name, find in LAYOUTS if find(settings, {}) is not None]

        assert found == [method]


def test_a_method_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(BaseModelError, match=r"quantised by hqq, expected one of .*gptq, awq, fp8"):
        find_layout({"quant_method": "hqq"}, {})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "compressed-tensors"}, {"ignore": ["lm_head"]}),
        (
            {"quant_method": "compressed-tensors", "ignore": ["re:.*gate", "lm_head"]},
            {"ignore": ["re:.*gate", "lm_head"]},
        ),
        ({"quant_method": "gptq"}, {}),
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["model.gate"]},
            {"modules_to_not_convert": ["model.gate", "lm_head"]},
        ),
        (
            {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["model.gate"]},
            {"llm_int8_skip_modules": ["model.gate", "lm_head"]},
        ),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": None}, {}),
        ({"quant_method": "torchao", "modules_to_not_convert": None}, {}),
    ],
)
def test_a_module_that_gets_a_plain_weight_is_named_where_the_method_asks_for_it(
    settings, expected
):
    assert with_plain(settings, ["lm_head"]) == settings | expected
    assert with_plain(settings, []) == settings
