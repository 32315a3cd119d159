"""Operators that TensorRT lacks are refused by name."""

from types import SimpleNamespace

import onnx_ir as ir
import pytest

from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.engine.operators import check_exporter, check_operators
from propulsion_export.errors import ArtifactError, UnavailableError

ADDING = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[4] counts, int64[9] experts, float[9] ones) => (float[4] counted) {
    [count] counted = ScatterElements <axis = 0, reduction = "add"> (counts, experts, ones)
}
"""

PACKED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
graph (float[n, 16] x, uint8[8, 1, 8] integers, float[8, 1] scales) => (float[n, 8] y) {
    [dense] y = com.microsoft.MatMulNBits <K = 16, N = 8, bits = 4, block_size = 16>
        (x, integers, scales)
}
"""


def test_integers_of_onnx_runtimes_own_operator_are_refused_with_the_form_that_builds():
    remedy = r"Tiny: its node 'dense'.*--quantization-form qdq"

    with pytest.raises(UnavailableError, match=remedy):
        check_operators(ir.from_onnx_text(PACKED), "Tiny")


@pytest.mark.parametrize("reduction", ["", ', reduction = "none"'])
def test_a_scatter_that_adds_is_refused_by_the_names_of_model_and_node(reduction):
    check_operators(ir.from_onnx_text(ADDING.replace(', reduction = "add"', reduction)), "Tiny")

    with pytest.raises(UnavailableError, match=r"Tiny: its node 'count'.*ONNX Runtime") as refusal:
        check_operators(ir.from_onnx_text(ADDING), "Tiny")

    assert refusal.value.exit_code == 3


@pytest.mark.parametrize(
    ("quantization", "remedy"),
    [
        (None, "Export with --exporter transformers."),
        (
            QuantizationEntry(4, "matmulnbits", 32, 4),
            "Export with --exporter transformers --quantization-form qdq.",
        ),
    ],
    ids=["float", "int4"],
)
def test_the_way_out_of_a_graph_of_the_builder_is_a_whole_one(quantization, remedy):
    manifest = SimpleNamespace(exporter="genai", quantization=quantization)

    with pytest.raises(ArtifactError) as refused:
        check_exporter(SimpleNamespace(shown="out", manifest=manifest))

    assert str(refused.value).endswith(remedy)
