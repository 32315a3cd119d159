"""Operators that TensorRT lacks are refused by name."""

import onnx_ir as ir
import pytest

from propulsion_export.engine.operators import check_operators
from propulsion_export.errors import UnavailableError

ADDING = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[4] counts, int64[9] experts, float[9] ones) => (float[4] counted) {
    [count] counted = ScatterElements <axis = 0, reduction = "add"> (counts, experts, ones)
}
"""


@pytest.mark.parametrize("reduction", ["", ', reduction = "none"'])
def test_a_scatter_that_adds_is_refused_by_the_names_of_model_and_node(reduction):
    check_operators(ir.from_onnx_text(ADDING.replace(', reduction = "add"', reduction)), "Tiny")

    with pytest.raises(UnavailableError, match=r"Tiny: its node 'count'.*ONNX Runtime") as refusal:
        check_operators(ir.from_onnx_text(ADDING), "Tiny")

    assert refusal.value.exit_code == 3
