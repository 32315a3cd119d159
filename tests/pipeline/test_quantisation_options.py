from pathlib import Path

import pytest

from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.cli import main
from propulsion_export.errors import UsageError
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.quantisation_options import QuantisationOptions

TEXTS = Path("texts.txt")


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({}, None),
        ({"quantize": "int4"}, QuantizationEntry(4, "matmulnbits", 32, 4)),
        (
            {"quantize": "int8", "block_size": 64, "accuracy_level": 1},
            QuantizationEntry(8, "matmulnbits", 64, 1),
        ),
        ({"quantize": "int4", "form": "qdq"}, QuantizationEntry(4, "qdq", 32)),
        ({"quantize": "int8", "form": "qdq"}, QuantizationEntry(8, "qdq", 0)),
        (
            {"quantize": "int8", "form": "qdq", "activations": True, "calibration": TEXTS},
            QuantizationEntry(8, "qdq", 0, activations="int8"),
        ),
    ],
    ids=["none", "int4", "int8", "int4-qdq", "int8-qdq", "w8a8"],
)
def test_the_manifest_records_what_was_chosen(options, scheme):
    assert QuantisationOptions(**options).scheme() == scheme


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 32}, "--block-size: does nothing without --quantize"),
        ({"form": "qdq"}, "--quantization-form: does nothing without --quantize"),
        (
            {"quantize": "int4", "form": "qdq", "accuracy_level": 4},
            "--accuracy-level: does nothing with --quantization-form qdq",
        ),
        (
            {"quantize": "int8", "form": "qdq", "calibration": TEXTS},
            "--calibration: does nothing without --quantize-activations",
        ),
        (
            {"quantize": "int4", "form": "qdq", "activations": True, "calibration": TEXTS},
            "expected --quantize int8 --quantization-form qdq",
        ),
        (
            {"quantize": "int8", "activations": True, "calibration": TEXTS},
            "in the form matmulnbits, expected --quantize int8",
        ),
        ({"quantize": "int8", "form": "qdq", "activations": True}, "--calibration FILE"),
        ({"quantize": "int4", "block_size": 48}, "expected one of 16, 32, 64, 128, 256"),
    ],
    ids=[
        "block-size-alone", "form-alone", "level-of-qdq", "calibration-alone", "int4-activations",
        "activations-of-matmulnbits", "without-calibration", "block-size-without-kernel",
    ],
)  # fmt: skip
def test_options_that_do_nothing_or_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        QuantisationOptions(**options).scheme()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "--quantize int4 with activations in bfloat16"),
        ({"untie": True}, "--untie: does nothing with --quantize"),
    ],
    ids=["bfloat16", "untie"],
)
def test_an_impossible_export_is_refused_before_anything_is_read(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_onnx(["no/adapter"], tmp_path / "out", quantize="int4", **options)

    assert not (tmp_path / "out").exists()


def test_a_quantised_artifact_asked_for_bfloat16_is_one_line_and_exit_2(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([
            "onnx", "-a", str(world.three), "-o", str(tmp_path / "out"), "--quantize", "int4",
            "--dtype", "bfloat16",
        ])  # fmt: skip

    assert exit.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_block_size_that_does_not_divide_a_layer_is_exit_2_and_leaves_nothing(
    world, tmp_path, capsys
):
    """The tiny BERT has 37 channels inside its feed-forward layers."""
    with pytest.raises(SystemExit) as exit:
        main([
            "onnx", "-a", str(world.three), "-o", str(tmp_path / "out"), "--quantize", "int4",
            "--quantization-form", "qdq",
        ])  # fmt: skip

    assert exit.value.code == 2
    assert "output.dense.weight has 37 inputs, expected a multiple" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
