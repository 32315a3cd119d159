"""The whole road of a quantised artifact: export, and a verdict that passes with its price told."""

import json

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.cli import main
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.quantisation.node_weights import node_weights
from propulsion_export.parity.inputs import load_recorded_base
from propulsion_export.parity.quantised.base_weights import every_linear_layer, match
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity

FORMS = {
    "int4": {"quantize": "int4"},
    "int8": {"quantize": "int8"},
    "qdq-int8": {"quantize": "int8", "quantization_form": "qdq"},
    "w8a8": {"quantize": "int8", "quantization_form": "qdq", "quantize_activations": True},
}


def texts_file(directory):
    file = directory / "texts.txt"
    words = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("a", "e", "i")]
    chooser = np.random.default_rng(4)
    lines = [" ".join(chooser.choice(words, 6)) for _ in range(16)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def quantised(make_world, tmp_path):
    """`quantised(kind, mode, form)`: an export with `one` folded, or with both adapters."""

    def make(kind, mode, form):
        world = make_world(kind, "text-classification" if kind == "bert" else None)
        adapters = [world.one] if mode == "folded" else [world.one, world.two]
        options = FORMS[form]
        if form == "w8a8":
            options = options | {"calibration": texts_file(tmp_path)}
        export_onnx(adapters, tmp_path / mode, mode=mode, **options)
        return tmp_path / mode

    return make


@pytest.mark.parametrize(
    ("kind", "mode", "form"),
    [
        ("bert", "folded", "int4"),
        ("bert", "bank", "qdq-int8"),
        ("bert", "switchable", "w8a8"),
        ("llama", "switchable", "int4"),
        ("llama", "folded", "qdq-int8"),
        ("llama", "bank", "int8"),
    ],
)
def test_a_right_export_passes_and_tells_its_price(kind, mode, form, quantised):
    report = check_parity(quantised(kind, mode, form))

    names = {"one"} if mode == "folded" else {"base", "one", "two"}
    assert report.passed, [check for check in report.checks if not check.passed]
    assert {price.adapter for price in report.price} == names
    assert all(price.kl > 0 and 0 < price.agreement <= 1 for price in report.price)
    assert all(price.perplexity is None for price in report.price)
    # The activations are rounded, and the cases are judged without that.
    assert all(each.error > 100 * each.exact for each in report.rounding)
    assert report.rounding


def test_perplexity_is_told_for_given_texts_and_a_limit_can_fail(quantised, tmp_path, capsys):
    directory = quantised("llama", "folded", "int4")
    texts = str(texts_file(tmp_path))

    with pytest.raises(SystemExit) as judged:
        main(
            ["parity", str(directory), "--inputs", texts, "--max-kl", "1e-9", "--json",
             "--report", str(tmp_path / "report"), "--junit", str(tmp_path / "junit.xml")]
        )  # fmt: skip
    told = json.loads(capsys.readouterr().out)

    assert judged.value.code == 1
    assert {check["case"] for check in told["checks"] if not check["passed"]} == {"price"}
    (price,) = told["price"]
    assert price["perplexity"] > 1
    assert price["unquantised_perplexity"] > 1
    assert "perplexity" in (tmp_path / "report" / "parity.html").read_text()
    assert 'name="price of one, logits"' in (tmp_path / "junit.xml").read_text()

    with pytest.raises(SystemExit) as untold:
        main(["parity", str(directory), "--max-kl", "10"])
    assert untold.value.code == 0
    assert "KL " in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "mode"), [("bert", "switchable"), ("llama", "folded")])
def test_an_engine_is_judged_over_the_weights_that_its_graph_has(kind, mode, quantised):
    """They cannot be read from an engine: which layers are quantised follows from the export."""
    artifact = Artifact.read(quantised(kind, mode, "qdq-int8"))
    entries = artifact.list_adapters()
    adapters = [Adapter.read(entry.source, name) for name, entry in entries.items()]
    base = load_recorded_base(artifact, adapters, None)
    kept = {name for adapter in adapters for name in adapter.modules}

    found = match(base, node_weights(read_graph(artifact.directory)), "float32")
    assumed = every_linear_layer(base, artifact.manifest.quantization, kept, "float32")

    by_path = {weight.path: weight.values for weight in found.weights}
    assert by_path.keys() == {weight.path for weight in assumed}
    for weight in assumed:
        for mine, read in zip(weight.values, by_path[weight.path], strict=True):
            np.testing.assert_array_equal(mine, read)
