"""Dynamic dimensions have one name each, the same on every input and output."""

import onnx_ir as ir

from propulsion_export.graph.dimensions import NameDimensions

TRACED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (int64[s18, s43] input_ids, int64[s7, s9] attention_mask)
    => (float[s18, s43, 4] hidden, float[s7, s9] kept, float[s18, 2] scores)
<float[5, 4] table = {1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,
                      1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0}> {
    hidden = Gather <axis = 0> (table, input_ids)
    kept = Cast <to = 1> (attention_mask)
    axes = Constant <value_ints = [1]> ()
    mean = ReduceMean <keepdims = 0> (hidden, axes)
    starts = Constant <value_ints = [0]> ()
    ends = Constant <value_ints = [2]> ()
    scores = Slice (mean, starts, ends, axes)
}
"""


def shapes(values):
    return {
        value.name: [d if isinstance(d, int) else d.value for d in value.shape] for value in values
    }


def test_every_input_and_output_uses_the_same_two_names():
    model = ir.from_onnx_text(TRACED)

    result = NameDimensions()(model)

    assert shapes(model.graph.inputs) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
    }
    assert shapes(model.graph.outputs) == {
        "hidden": ["batch", "sequence", 4],
        "kept": ["batch", "sequence"],
        "scores": ["batch", 2],
    }
    assert result.modified


def test_values_in_between_are_renamed_too():
    model = ir.from_onnx_text(TRACED)
    (mean,) = [v for node in model.graph for v in node.outputs if v.name == "mean"]
    mean.shape = ir.Shape(["s18", 4])

    NameDimensions()(model)

    assert shapes([mean]) == {"mean": ["batch", 4]}


def test_symbols_of_other_origin_and_fixed_sizes_stay():
    model = ir.from_onnx_text(TRACED)
    kept = model.graph.outputs[1]
    kept.shape = ir.Shape(["s99", 3])

    NameDimensions()(model)

    assert shapes([kept]) == {"kept": ["s99", 3]}


def test_graph_of_fixed_sizes_is_not_modified():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> graph (float[2, 3] x) => (float[2, 3] y) '
        "{ y = Neg (x) }"
    )

    assert not NameDimensions()(model).modified
