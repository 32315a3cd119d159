"""The configuration refuses what cannot be and is the same file for the same adapter."""

import importlib
import json

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import propulsion_export.tuning
from propulsion_export.errors import UsageError
from propulsion_export.tuning import PropulsionConfig


@pytest.mark.parametrize("degree", [0, -1, float("nan"), float("inf"), "15", True, None])
def test_degree_that_is_no_positive_number_is_refused(degree):
    with pytest.raises(UsageError, match="degree"):
        PropulsionConfig(degree=degree)


def test_degree_need_not_be_an_integer():
    assert PropulsionConfig(degree=2.5).degree == 2.5


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param("(", id="broken-regex"),
        pytest.param("all-linear", id="peft-shorthand"),
        pytest.param([], id="empty"),
        pytest.param([1], id="numbers"),
        pytest.param(5, id="number"),
    ],
)
def test_targets_that_cannot_be_are_refused(targets):
    with pytest.raises(UsageError, match="target_modules"):
        PropulsionConfig(target_modules=targets)


def test_every_wrong_value_is_named_at_once():
    with pytest.raises(UsageError, match=r"degree.*exclude_modules.*labels"):
        PropulsionConfig(degree=0, exclude_modules="(", labels="yes")


def test_no_targets_means_all():
    assert PropulsionConfig().target_modules == "all"


def test_saved_file_does_not_depend_on_the_order_of_names(tmp_path):
    for name, targets in (("one", ["b", "a", "c"]), ("other", ["c", "b", "a"])):
        config = PropulsionConfig(target_modules=targets, exclude_modules=set(targets))
        config.target_modules = set(targets)  # as PEFT leaves it when it shortens a long list
        config.save_pretrained(tmp_path / name)

    one, other = (
        (tmp_path / name / "adapter_config.json").read_text() for name in ("one", "other")
    )
    assert one == other
    assert json.loads(one)["target_modules"] == ["a", "b", "c"]


def test_saved_configuration_comes_back_through_peft(tmp_path):
    config = PropulsionConfig(
        target_modules="attention", degree=2.5, train_bias=True, labels=["no", "yes"]
    )
    config.save_pretrained(tmp_path)

    assert PeftConfig.from_pretrained(tmp_path) == config


def test_importing_the_package_again_registers_nothing_twice():
    importlib.reload(propulsion_export.tuning)

    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PROPULSION] is PropulsionConfig
    assert [kind.value for kind in PeftType].count("PROPULSION") == 1
