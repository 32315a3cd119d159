"""Inputs with a default become required ones, or weights."""

import onnx_ir as ir

from propulsion_export.graph.files import read_graph
from propulsion_export.graph.passes.required_inputs import require_inputs_


def test_an_optional_input_becomes_a_required_one(switchable):
    model = read_graph(switchable().directory)

    require_inputs_(model)

    assert [value.name for value in model.graph.inputs][-1] == "propulsion_scales"
    assert "propulsion_scales" not in model.graph.initializers
    assert "weight" in model.graph.initializers


def test_an_input_named_constant_becomes_a_weight(switchable):
    model = read_graph(switchable().directory)

    require_inputs_(model, constant=["propulsion_scales"])

    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask"]
    assert "propulsion_scales" in model.graph.initializers


def test_dimensions_written_as_digits_become_numbers(graph):
    model = graph(CONSTANT)
    model.graph.inputs[0].shape = ir.Shape(["batch", "2"])

    require_inputs_(model)

    assert [str(size) for size in model.graph.inputs[0].shape] == ["batch", "2"]
    assert model.graph.inputs[0].shape[1] == 2


CONSTANT = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x) => (float[batch, 2] y) {
    c = Constant <value = float[1] {3.0}> ()
    y = Mul (x, c)
}
"""
