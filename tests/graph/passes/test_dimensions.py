"""Dynamic dimensions have one name each, the same on every input and output."""

import onnx_ir as ir

from propulsion_export.graph.passes.dimensions import NameDimensions

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


# Caches


def cached(inputs, outputs=()):
    """A graph of inputs and outputs by name and shape, which the exporter left as they are."""
    made = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in inputs.items()
    }
    nodes = []
    for name, shape in dict(outputs).items():
        node = ir.node("Identity", [next(iter(made.values()))])
        node.outputs[0].name, node.outputs[0].shape = name, ir.Shape(shape)
        nodes.append(node)
    ends = [node.outputs[0] for node in nodes]
    body = ir.Graph(list(made.values()), ends, nodes=nodes, opset_imports={"": 20}, name="main")
    return ir.Model(body, ir_version=10)


DECODER = {
    "input_ids": ["s10", "s70"],
    "attention_mask": ["s43", "s53"],
    "position_ids": ["s10", "s70"],
    "past_key_values.0.key": ["s10", 2, "s54", 8],
    "past_key_values.0.value": ["s10", "2", "s54", "8"],
}


def test_dimensions_of_a_decoder_tell_the_past_the_new_tokens_and_both():
    model = cached(
        DECODER,
        {
            "logits": ["s10", "s70", 100],
            "present.0.key": ["s10", 2, "s54 + s70", 8],
            "present.0.value": ["s10", 2, "s53", 8],
        },
    )

    NameDimensions()(model)

    assert shapes(model.graph.inputs) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.key": ["batch", 2, "past_sequence", 8],
        "past_key_values.0.value": ["batch", 2, "past_sequence", 8],
    }
    assert shapes(model.graph.outputs) == {
        "logits": ["batch", "sequence", 100],
        "present.0.key": ["batch", 2, "total_sequence", 8],
        "present.0.value": ["batch", 2, "total_sequence", 8],
    }


def test_mask_whose_length_is_written_as_a_sum_is_the_total():
    model = cached({**DECODER, "attention_mask": ["s10", "s54 + s70"]}, {"x": ["s54 + s70", 1]})

    NameDimensions()(model)

    assert shapes(model.graph.inputs)["attention_mask"] == ["batch", "total_sequence"]
    assert shapes(model.graph.outputs) == {"x": ["total_sequence", 1]}


def test_sums_in_between_are_told_in_the_names():
    model = cached(DECODER, {"x": ["s10*s70", "s54 + s70 + 1", "s99 + s5", "s700"]})

    NameDimensions()(model)

    assert shapes(model.graph.outputs) == {
        "x": ["batch*sequence", "past_sequence + sequence + 1", "s99 + s5", "s700"]
    }


def test_dimensions_of_an_encoder_decoders_first_step():
    model = cached(
        {
            "input_ids": ["s11", "s28"],
            "encoder_attention_mask": ["s43", "s53"],
            "encoder_hidden_states": ["s11", "s53", 32],
        },
        {
            "logits": ["s11", "s28", 100],
            "present.0.decoder.key": ["s11", 4, "s28", 8],
            "present.0.encoder.key": ["s11", 4, "s53", 8],
        },
    )

    NameDimensions()(model)

    assert shapes(model.graph.inputs) == {
        "input_ids": ["batch", "sequence"],
        "encoder_attention_mask": ["batch", "encoder_sequence"],
        "encoder_hidden_states": ["batch", "encoder_sequence", 32],
    }
    assert shapes(model.graph.outputs) == {
        "logits": ["batch", "sequence", 100],
        "present.0.decoder.key": ["batch", 4, "sequence", 8],
        "present.0.encoder.key": ["batch", 4, "encoder_sequence", 8],
    }


def test_dimensions_of_an_encoder_decoders_later_steps():
    """The exporter does not know that all parts of a cache have one length."""
    model = cached(
        {
            "input_ids": ["s11", "s28"],
            "encoder_attention_mask": ["s43", "s12"],
            "past_key_values.0.decoder.key": ["s11", 4, "s84", 8],
            "past_key_values.0.decoder.value": ["s11", 4, "s54", 8],
            "past_key_values.0.encoder.key": ["s11", 4, "s12", 8],
        },
        {
            "present.0.decoder.key": ["s11", 4, "s28 + s84", 8],
            "present.0.decoder.value": ["s11", 4, "s28 + s54", 8],
        },
    )

    NameDimensions()(model)

    found = shapes(model.graph.inputs)
    assert found["encoder_attention_mask"] == ["batch", "encoder_sequence"]
    assert found["past_key_values.0.decoder.key"] == ["batch", 4, "past_sequence", 8]
    assert found["past_key_values.0.decoder.value"] == ["batch", 4, "past_sequence", 8]
    assert found["past_key_values.0.encoder.key"] == ["batch", 4, "encoder_sequence", 8]
    assert shapes(model.graph.outputs) == {
        "present.0.decoder.key": ["batch", 4, "total_sequence", 8],
        "present.0.decoder.value": ["batch", 4, "total_sequence", 8],
    }


def test_sizes_written_as_digits_become_numbers_everywhere():
    model = cached({"input_ids": ["s1", "s2"], "x": ["s1", "s2", "7"]}, {"y": ["12", "s2", "s1"]})

    NameDimensions()(model)

    assert shapes(model.graph.inputs)["x"] == ["batch", "sequence", 7]
    assert shapes(model.graph.outputs)["y"] == [12, "sequence", "batch"]


def test_fixed_size_where_a_dimension_is_expected_stays_fixed():
    """A name would claim that the graph takes any length."""
    model = cached(
        {**DECODER, "past_key_values.0.key": ["s10", 2, 11, 8], "input_ids": ["3", "s70"]},
        {"present.0.key": ["s10", 2, 13, 8], "logits": ["3", "s70", 100]},
    )

    NameDimensions()(model)

    assert shapes(model.graph.inputs)["past_key_values.0.key"] == ["batch", 2, 11, 8]
    assert shapes(model.graph.inputs)["input_ids"] == [3, "sequence"]
    assert shapes(model.graph.outputs) == {
        "present.0.key": ["batch", 2, 13, 8], "logits": [3, "sequence", 100]
    }  # fmt: skip


def test_unknown_dimension_of_a_cache_is_named_too():
    model = cached(DECODER, {"present.0.key": [None, 2, None, 8]})

    NameDimensions()(model)

    assert shapes(model.graph.outputs) == {"present.0.key": ["batch", 2, "total_sequence", 8]}
