"""Graphs with int4 and int8 weights compute what PyTorch computes with the dequantised weights."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from genai_models import adapter_for, base_of, decoded, distance, make, oracle, some_tokens

from propulsion_export.artifacts.layout import to_row
from propulsion_export.errors import ToolError
from propulsion_export.graph.genai import modes
from propulsion_export.graph.genai.base import base_graph
from propulsion_export.graph.genai.dequantised import dequantised, quantised_nodes
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.parity.built_graph import check_base_graph

EXACT = 1e-5  # relative; PyTorch's own error in float32 is up to 3e-6 in these models
NAMES = ["llama", "llama-tied", "llama-biases", "qwen3", "gemma2", "phi", "phi3"]
BITS = [pytest.param(4, id="int4"), pytest.param(8, id="int8")]


def request_of(bits):
    """Float32 inside the layers, so that only mistakes differ."""
    return modes.Request(torch.float32, GenaiOptions(bits=bits, accuracy_level=1))


def dequantised_model(model, bits):
    return dequantised(base_graph(model, torch.float32, request_of(bits).options))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_over_integers_are_exact_switched_and_folded(name, bits, tmp_path):
    model, tokens = make(name), some_tokens()
    adapter = adapter_for(model)
    made = modes.build_switchable(base_of(model), [adapter], [adapter], request_of(bits))
    program = made.exported.programs["model.onnx"]
    expected = oracle(dequantised_model(model, bits), tokens, adapter)

    switched = decoded(program, tokens, tmp_path, **made.exported.feeds[adapter.name])
    assert distance(switched, expected) < EXACT
    folded = modes.build_folded(base_of(model), adapter, request_of(bits), untie=False)
    found = decoded(folded.exported.programs["model.onnx"], tokens, tmp_path)
    assert distance(found, expected) < EXACT
    assert distance(oracle(model, tokens, adapter), expected) > 1e-3  # quantisation has a price


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_a_bank_over_integers(bits, tmp_path):
    model, tokens = make("llama-biases"), some_tokens(rows=2)
    adapter = adapter_for(model)
    made = modes.build_bank(base_of(model), [adapter], [adapter], request_of(bits))
    exported = made.exported
    bank = np.stack([to_row(exported.feeds[n], exported.layout) for n in ("base", "tuned1")])
    program = exported.programs["model.onnx"]

    found = decoded(program, tokens, tmp_path, propulsion_bank=bank, adapter_ids=np.array([1, 0]))

    plain = dequantised_model(model, bits)
    assert distance(found[:1], oracle(plain, tokens[:1], adapter)) < EXACT
    assert distance(found[1:], oracle(plain, tokens[1:])) < EXACT


def test_folding_leaves_the_integers_as_they_are():
    model = make("llama")
    adapter = adapter_for(model, only="proj")
    graph = base_graph(model, torch.float32, request_of(4).options)
    folded = modes.build_folded(base_of(model), adapter, request_of(4), untie=False)
    program = folded.exported.programs["model.onnx"]
    plain = {node.name: node for node in quantised_nodes(graph.program)}
    assert len(program.graph) == len(graph.program.graph)
    for node in quantised_nodes(program):
        before = plain[node.name].inputs[1].const_value.numpy()
        assert (node.inputs[1].const_value.numpy() == before).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_the_base_graph_is_compared_with_the_dequantised_weights(name, bits):
    model = make(name)
    options = GenaiOptions(bits=bits)
    graph = base_graph(model, torch.float32, options)
    check_base_graph(graph)
    levels = {node.attributes["accuracy_level"].as_int() for node in quantised_nodes(graph.program)}
    assert levels == {4}


@pytest.mark.parametrize("bits", BITS)
def test_one_wrong_norm_over_integers_is_caught(bits):
    graph = base_graph(make("llama"), torch.float32, GenaiOptions(bits=bits))
    weight = graph.program.graph.initializers["model.layers.1.input_layernorm.weight"]
    values = weight.const_value.numpy().copy()
    values[7] *= 1.01
    weight.const_value = ir.tensor(values, name=weight.name)
    with pytest.raises(ToolError, match="is not the model"):
        check_base_graph(graph)
