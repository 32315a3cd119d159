"""An adapter folded into quantisation scales: exact folds pass, and every mistake fails."""

from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.pipeline.parity import check_parity
from quantised import fold_quantised

SCHEMES = {
    "int4": QuantizationEntry(4, "matmulnbits", 16, accuracy_level=4),
    "int8": QuantizationEntry(8, "matmulnbits", 16, accuracy_level=4),
    "qdq-int4": QuantizationEntry(4, "qdq", 16),
    "qdq-int8": QuantizationEntry(8, "qdq", 0),
}


def failed(report):
    return {check.case for check in report.checks if not check.passed}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_a_fold_into_the_scales_passes(scheme, exported, tmp_path):
    source = exported("qwen3", "switchable")

    report = check_parity(fold_quantised(source, tmp_path / "folded", "one", scheme))

    (weights,) = [check for check in report.checks if check.case == "weights"]
    assert report.passed, [c for c in report.checks if not c.passed]
    assert "times the adapter's, rounded once" in weights.detail
    assert report.price


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_negative_and_zero_scales_pass(scheme, exported, tmp_path):
    """Where scales must be positive, their sign and their zeros stay in a multiply."""
    source = exported("llama", "switchable")
    right = Adapter.read(Artifact.read(source).manifest.adapters["one"].source, "one")
    signs = {path: np.ones_like(scale.values) for path, scale in right.scales.items()}
    for path, values in signs.items():
        if path.endswith(("_proj", "lm_head")):
            values[::5], values[3] = -1, 0
    signed = {
        path: Scale(signs[path] * scale.values, scale.side) for path, scale in right.scales.items()
    }
    (tmp_path / "one").mkdir()
    replace(right, scales=signed).write(tmp_path / "one")

    report = check_parity(
        fold_quantised(source, tmp_path / "folded", "one", scheme, source=tmp_path / "one")
    )

    assert report.passed, [c for c in report.checks if not c.passed]


def change(index, by):
    def mistake(values):
        name = next(name for name in values if "v_proj" in name)
        return {
            **values,
            name: np.where(np.arange(values[name].size) == index, by, 1) * values[name],
        }

    return mistake


def dropped(values):
    return {name: np.ones_like(each) for name, each in values.items()}


def exchanged(values):
    one, other = [name for name in values if "q_proj" in name][:2]
    return {**values, one: values[other], other: values[one]}


@pytest.mark.parametrize("scheme", [SCHEMES["int4"], SCHEMES["qdq-int8"]], ids=["int4", "qdq-int8"])
@pytest.mark.parametrize(
    ("mistake", "cases"),
    [
        pytest.param(dropped, {"parity", "effect"}, id="dropped"),
        pytest.param(change(3, 1.01), {"parity", "weights"}, id="one-channel-off-by-a-percent"),
        pytest.param(change(3, -1), {"parity"}, id="one-channel-with-the-wrong-sign"),
        pytest.param(exchanged, {"parity", "weights"}, id="two-layers-exchanged"),
    ],
)
def test_a_fold_with_a_mistake_fails(mistake, cases, scheme, exported, tmp_path):
    source = exported("qwen3", "switchable")

    report = check_parity(
        fold_quantised(source, tmp_path / "folded", "one", scheme, mistake=mistake)
    )

    assert cases <= failed(report)
