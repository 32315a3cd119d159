"""Every layout in the table has its module, and takes its own options only."""

import importlib
from dataclasses import fields

import pytest
from click.testing import CliRunner

from propulsion_export import packaging
from propulsion_export.cli.app import app
from propulsion_export.errors import UsageError
from propulsion_export.packaging.layouts import LAYOUTS, PackageOptions
from propulsion_export.pipeline.package import package

OPTIONS = {"model_name": "m", "max_batch_size": 4}
FOREIGN = [
    (layout, option)
    for layout, entry in LAYOUTS.items()
    for option in OPTIONS
    if option not in entry.options
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_module_of_a_layout_plans_and_says_what_to_type_next(name, tmp_path):
    module = importlib.import_module(f"{packaging.__name__}.{LAYOUTS[name].module}")

    assert callable(module.plan)
    assert str(tmp_path) in module.next_command(tmp_path, ["a"])
    assert str(tmp_path) in module.next_command(tmp_path, [])


def test_options_are_those_of_the_layouts():
    names = {option for entry in LAYOUTS.values() for option in entry.options}

    assert names == {field.name for field in fields(PackageOptions)} == OPTIONS.keys()


@pytest.mark.parametrize(("layout", "option"), FOREIGN)
def test_option_of_another_layout_is_refused_by_name(layout, option, folded, tmp_path):
    name = f"--{option.replace('_', '-')}"
    value = {option: OPTIONS[option]}

    with pytest.raises(UsageError, match=f"^{name}: for --layout triton, found {layout}"):
        package(folded, tmp_path / "out", layout=layout, **value)


def test_unknown_layout_is_refused_with_those_there_are(folded, tmp_path):
    with pytest.raises(UsageError, match="'vllm': is unknown, expected one of genai, onnx-adapter"):
        package(folded, tmp_path / "out", layout="vllm")

    assert not (tmp_path / "out").exists()


def test_help_lists_every_layout():
    shown = " ".join(CliRunner().invoke(app, ["package", "--help"]).output.split())

    assert [name for name in LAYOUTS if name not in shown] == []
