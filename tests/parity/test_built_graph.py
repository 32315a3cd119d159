"""The comparison of a built graph with PyTorch passes what is the model, and nothing else."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from genai_models import adapter_for, base_of, make

from propulsion_export.errors import ToolError
from propulsion_export.graph.genai import modes
from propulsion_export.graph.genai.base import base_graph
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.parity.built_graph import check_built_graph
from propulsion_export.scaling.fold.model import fold_


def graph_of(model):
    return base_graph(model, torch.float32, GenaiOptions()).program


def test_the_weights_are_those_of_before_afterwards():
    model = make("llama-tied")
    program = graph_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    check_built_graph(model, program)

    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("planted", [1e-3, np.nan])
def test_one_wrong_weight_is_caught(planted):
    model = make("llama")
    program = graph_of(model)
    weight = program.graph.initializers["model.layers.1.mlp.down_proj.MatMul.weight"]
    values = weight.const_value.numpy().copy()
    values[3, 5] += planted
    weight.const_value = ir.tensor(values, name=weight.name)
    with pytest.raises(ToolError, match=r"LlamaForCausalLM: the graph .* is not the model"):
        check_built_graph(model, program)


def test_a_window_too_long_to_be_computed_is_read_from_the_graph():
    model = make("mistral-windowed", sliding_window=4096)
    program = graph_of(model)
    check_built_graph(model, program)
    for node in program.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 2048)
    with pytest.raises(ToolError, match="has a window of 2048, the model of 4096 tokens"):
        check_built_graph(model, program)


def test_a_folded_graph_is_compared_with_the_folded_model():
    model, adapter = make("llama"), adapter_for(make("llama"))
    made = modes.build_folded(base_of(model), adapter, modes.Request(torch.float32), untie=False)
    program = made.exported.programs["model.onnx"]
    check_built_graph(made.model, program)
    with pytest.raises(ToolError, match="is not the model"):
        check_built_graph(model, program)
    fold_(model, adapter)
    check_built_graph(model, program)
