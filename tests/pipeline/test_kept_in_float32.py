"""An export in float16 keeps in float32 what transformers keeps there."""

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.pipeline.parity import check_parity


def initializers(directory):
    """The dtypes of float initializers of a graph's file by shape, largest first."""
    return {
        value.dtype
        for file in directory.glob("*.onnx")
        for value in ir.load(file).graph.initializers.values()
        if value.shape is not None and tuple(value.shape) in ((37, 32), (32, 37))
    }


# Each is three traces; what is kept in float32 is loaded so before the mode matters.
@pytest.mark.parametrize(
    "mode",
    ["folded", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("switchable", "bank"))],
)
def test_wo_of_t5_is_float32_and_the_rest_float16(mode, exported):
    directory = exported("t5", mode, "float16")

    report = check_parity(directory)

    assert report.passed, [check for check in report.checks if not check.passed]
    assert initializers(directory) == {ir.DataType.FLOAT16, ir.DataType.FLOAT}


@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_frequencies_of_llama_are_not_rounded(mode, exported):
    directory = exported("llama", mode, "float16")

    report = check_parity(directory)

    assert report.passed, [check for check in report.checks if not check.passed]
    found = [
        value.const_value.numpy().ravel()
        for value in ir.load(directory / "model.onnx").graph.initializers.values()
        if value.const_value is not None and value.const_value.size == 4
    ]
    exact = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    assert any(np.allclose(values, exact, rtol=1e-6) for values in found if values.dtype == "f4")
