import pytest

from propulsion_export.errors import BaseModelError
from propulsion_export.merging.quantised.config_groups import ConfigGroups


def group(targets, **weights):
    return {"targets": targets, "weights": {"num_bits": 8, "type": "int", **weights}}


def groups(**named):
    return ConfigGroups({"config_groups": named})


def test_names_come_before_expressions_and_those_before_classes():
    found = groups(
        by_class=group(["Linear"], num_bits=2),
        by_expression=group([r"re:.*self_attn\..*"], num_bits=3),
        by_name=group(["model.layers.0.self_attn.q_proj"], num_bits=4),
    )

    assert found.weights("model.layers.0.self_attn.q_proj").bits == 4
    assert found.weights("model.layers.1.self_attn.q_proj").bits == 3
    assert found.weights("model.layers.1.mlp.up_proj").bits == 2


@pytest.mark.parametrize(("size", "strategy"), [(None, "tensor"), (-1, "channel"), (32, "group")])
def test_a_strategy_that_is_not_given_follows_from_the_size_of_groups(size, strategy):
    found = groups(only=group(["Linear"], group_size=size)).weights("layer")

    assert found.strategy == strategy


@pytest.mark.parametrize(
    "found",
    [
        groups(other=group(["model.layers.0"])),
        groups(one=group(["re:lay.*"]), two=group(["re:.*er"], num_bits=4)),
        ConfigGroups({"config_groups": {"W8A8": ["Linear"]}}),
        groups(activations={"targets": ["Linear"], "weights": None}),
    ],
    ids=["none", "two", "preset", "activations"],
)
def test_a_module_that_the_groups_do_not_settle_is_refused(found):
    with pytest.raises(BaseModelError, match="layer: the names in config_groups do not say"):
        found.weights("layer")


def test_an_unknown_strategy_is_refused():
    with pytest.raises(BaseModelError, match="quantised by attn_head"):
        groups(only=group(["Linear"], strategy="attn_head")).weights("layer")


def test_only_what_rows_share_changes_in_the_configuration():
    found = groups(
        tensor=group(["a"], strategy="tensor"),
        block=group(["b"], strategy="block", block_structure=[128, 64]),
        rows=group(["c"], strategy="group", group_size=8),
    )

    changed = found.by_rows()["config_groups"]

    assert changed["tensor"]["weights"]["strategy"] == "channel"
    assert changed["block"]["weights"]["block_structure"] == [1, 64]
    assert changed["rows"] == found.settings["config_groups"]["rows"]
    assert found.settings["config_groups"]["tensor"]["weights"]["strategy"] == "tensor"
