import numpy as np
import onnx_ir as ir
import pytest
import torch

from propulsion_export.graph.quantisation import QuantiseActivations, QuantiseWeights
from propulsion_export.graph.quantisation.calibration import measure_inputs
from quantised_graphs import DQ8, make_graph, operators, run

LARGEST = {"up": 1.6, "down": 4.0, "conv": 8.0}


def quantised():
    return QuantiseWeights(DQ8)(make_graph()).model


def test_what_layers_read_is_rounded_to_int8_and_nothing_else():
    model = quantised()
    expected = run(model)

    found = run(QuantiseActivations(LARGEST)(model).model)

    assert np.abs(found - expected).max() > 0
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    assert operators(model).count("QuantizeLinear") == 3


def test_scales_hold_the_largest_value_and_zero_points_are_zero():
    model = QuantiseActivations(LARGEST)(quantised()).model

    for parameter, largest in LARGEST.items():
        constants = model.graph.initializers
        scale = constants[f"{parameter}_input_scale"].const_value.numpy()
        assert scale == np.float32(largest / 127)
        assert constants[f"{parameter}_input_zero_point"].const_value.numpy() == 0


def test_a_layer_that_was_not_measured_is_refused():
    with pytest.raises(ir.passes.PreconditionError, match="down"):
        QuantiseActivations({"up": 1.0, "conv": 1.0})(quantised())


def test_the_largest_inputs_are_those_of_the_base_and_of_every_adapter(tiny_model, random_adapter):
    model = tiny_model("bert")
    one, two = (random_adapter(model, seed, name=f"n{seed}") for seed in (1, 2))
    batch = {
        "input_ids": np.array([[2, 11, 42, 3], [2, 7, 3, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    measured = [measure_inputs(model, [batch], adapters) for adapters in ([], [one], [two])]

    both = measure_inputs(model, [batch], [one, two])

    assert both == {name: max(each[name] for each in measured) for name in both}
    assert measured[0] != measured[1] != measured[2]
    assert "bert.encoder.layer.1.output.dense.weight" in both
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(both) == len(linears)
    assert not any(m._forward_pre_hooks for m in linears)


def test_a_tied_weight_is_measured_under_both_of_its_names(tiny_model):
    model = tiny_model("gpt2")
    batch = {"input_ids": np.array([[2, 11, 42, 3]]), "attention_mask": np.ones((1, 4), np.int64)}

    measured = measure_inputs(model, [batch], [])

    assert measured["lm_head.weight"] == measured["transformer.wte.weight"] > 0
