from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.errors import ArtifactError, BaseModelError, UsageError
from propulsion_export.graph.quantisation import (
    Part,
    QuantiseWeights,
    check_quantisable,
    dequantise,
    needed_opset,
    quantised_weights,
)
from quantised_graphs import (
    DQ4,
    DQ8,
    PARAMETERS,
    Q4,
    SCHEMES,
    draw_scales,
    make_graph,
    multiply_by,
    operators,
    run,
    without_quantisation,
)

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


@every_scheme
def test_the_graph_computes_with_the_dequantised_weights(scheme):
    scales = draw_scales()
    model = QuantiseWeights(scheme)(multiply_by(make_graph(), scales)).model

    expected = run(multiply_by(without_quantisation(model), scales))

    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-4)
    assert np.abs(run(multiply_by(make_graph(), scales)) - expected).max() > 1e-2


@every_scheme
def test_every_linear_layer_is_read_back_in_the_orientation_of_its_outputs(scheme):
    model = QuantiseWeights(scheme)(make_graph()).model

    read = quantised_weights(model)

    assert read.keys() == PARAMETERS.keys()
    float_weights = make_graph().graph.initializers
    for parameter, weight in read.items():
        own = float_weights[parameter].const_value.numpy()
        own = own.T if parameter == "conv" else own
        assert weight.integers.shape == own.shape
        assert weight.block_size == scheme.block_size
        assert np.abs(dequantise(weight) - own).max() < 0.3
        assert np.corrcoef(dequantise(weight).ravel(), own.ravel())[0, 1] > 0.98
    assert not {name for name in model.graph.initializers if name in PARAMETERS}


def test_scales_for_tensorrt_are_positive_and_have_no_zero_points():
    for scheme in (DQ4, DQ8):
        model = QuantiseWeights(scheme)(make_graph()).model

        nodes = [node for node in model.graph if node.op_type == "DequantizeLinear"]

        assert len(nodes) == 3
        assert all(len(node.inputs) == 2 for node in nodes)
        assert all((weight.scales > 0).all() for weight in quantised_weights(model).values())


def test_a_parameter_that_adapters_bring_stays_in_floating_point():
    model = QuantiseWeights(Q4, keep=["down"])(make_graph()).model

    assert quantised_weights(model).keys() == {"up", "conv"}
    assert "down" in model.graph.initializers


def test_a_weight_that_is_used_twice_is_quantised_once():
    model = make_graph()
    second = next(node for node in model.graph if node.op_type == "Gemm")
    product = ir.node("MatMul", [second.inputs[0], second.inputs[1]])
    both = ir.node("Add", [second.outputs[0], product.outputs[0]])
    model.graph.insert_after(second, [product, both])
    for user, index in list(second.outputs[0].uses()):
        if user is not both:
            user.replace_input_with(index, both.outputs[0])

    quantised = QuantiseWeights(DQ8)(model).model

    assert [n for n in quantised.graph.initializers if n.startswith("conv_DQ")] == [
        "conv_DQ_Q8", "conv_DQ_scales"
    ]  # fmt: skip
    assert operators(quantised).count("DequantizeLinear") == 4
    assert quantised_weights(quantised).keys() == PARAMETERS.keys()


def test_a_weight_that_an_embedding_shares_stays_beside_its_integers():
    model = make_graph()
    table = model.graph.initializers["table"]
    last = model.graph.outputs[0]
    transposed = ir.node("Transpose", [table], {"perm": [1, 0]})
    head = ir.node("MatMul", [last, transposed.outputs[0]])
    model.graph.extend([transposed, head])
    model.graph.outputs[0] = head.outputs[0]
    head.outputs[0].name, head.outputs[0].dtype = "logits", ir.DataType.FLOAT

    quantised = QuantiseWeights(Q4)(model).model

    assert "table" in quantised.graph.initializers
    assert "table" in quantised_weights(quantised)
    assert operators(quantised)[-1] == "MatMulNBits"


def test_a_block_that_does_not_divide_a_layers_inputs_is_refused_by_name():
    with pytest.raises(UsageError, match=r"up has 48 inputs, expected a multiple") as error:
        check_quantisable(make_graph(), replace(DQ4, block_size=32))

    assert "matmulnbits" in str(error.value)


def test_a_graph_without_linear_layers_is_refused():
    with pytest.raises(BaseModelError, match="no linear layer"):
        check_quantisable(make_graph(), Q4, keep=PARAMETERS)


def test_blocks_and_int4_need_opset_21():
    assert needed_opset(DQ4) == needed_opset(replace(DQ8, block_size=32)) == 21
    assert needed_opset(DQ8) == needed_opset(Q4) == 1
    model = make_graph()
    model.opset_imports[""] = 20
    with pytest.raises(ir.passes.PreconditionError, match="opset 20"):
        QuantiseWeights(DQ4)(model)


def test_a_packed_node_is_read_as_the_parameters_it_holds():
    """As onnxruntime-genai packs query, key and value, and splits what Phi3 has as one."""
    model = QuantiseWeights(Q4)(make_graph()).model
    whole = quantised_weights(model)
    places = {"q": [Part("up", 0, 48)], "kv": [Part("up", 48), Part("down")]}

    with pytest.raises(ValueError, match="dimensions"):
        quantised_weights(model, places)  # of other widths, so they are no one parameter
    places["kv"] = [Part("conv"), Part("up", 48)]
    read = quantised_weights(model, places)

    np.testing.assert_array_equal(read["q"].integers, whole["up"].integers[:48])
    np.testing.assert_array_equal(
        dequantise(read["kv"]),
        np.concatenate([dequantise(whole["conv"]), dequantise(whole["up"])[48:]]),
    )


def test_a_place_that_is_not_in_the_graph_is_refused():
    model = QuantiseWeights(Q4)(make_graph()).model

    with pytest.raises(ArtifactError, match="lm_head"):
        quantised_weights(model, {"head": [Part("lm_head")]})
