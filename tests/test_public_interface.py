import importlib
import inspect
import subprocess
import sys

import pytest

import propulsion_export


@pytest.mark.parametrize("name", propulsion_export.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(propulsion_export, name))


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        propulsion_export.nothing  # noqa: B018


@pytest.mark.parametrize(
    "imports", ["import propulsion_export, peft", "import peft, propulsion_export"]
)
def test_peft_reads_our_adapters_whichever_is_imported_first(imports, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROPULSION", "degree": 3}')
    program = (
        f"{imports}\nconfig = peft.PeftConfig.from_pretrained({str(tmp_path)!r})\n"
        "print(type(config).__name__, config.degree)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["PropulsionConfig", "3"]


def test_options_of_the_command_line_are_parameters_of_the_functions():
    """Parameter names equal the long options."""
    for name, function in (
        ("merge", propulsion_export.merge),
        ("onnx", propulsion_export.export_onnx),
        ("parity", propulsion_export.check_parity),
        ("run", propulsion_export.predict),
        ("package", propulsion_export.package),
    ):
        command = importlib.import_module(f"propulsion_export.cli.{name}").command
        options = {option.name for option in command.params}
        only_there = {"as_json", "quiet", "verbose", "no_parity", "junit", "schema", "summary"}
        if name == "merge":  # a GGUF file has a function of its own
            only_there |= inspect.signature(propulsion_export.merge_gguf).parameters.keys()
        if name == "onnx":  # the parameters of a function of its own
            only_there |= inspect.signature(propulsion_export.fold_onnx).parameters.keys()
        assert options - only_there <= inspect.signature(function).parameters.keys(), name
