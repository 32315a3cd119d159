"""In each mode a builder's graph computes what PyTorch computes with the adapter attached."""

import numpy as np
import pytest
import torch
from genai_models import MODELS, adapter_for, base_of, decoded, distance, make, oracle, some_tokens

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.layout import to_row
from propulsion_export.graph.genai import modes, nodes
from propulsion_export.graph.genai.base import base_graph
from propulsion_export.graph.genai.options import GenaiOptions

EXACT = 1e-5  # relative; PyTorch's own error in float32 is up to 3e-6 in these models
PLACEMENTS = ("", "embed_tokens", "self_attn.q", "o_proj", "gate", "down", "norm", "lm_head")
OPTIONS = GenaiOptions()
REQUEST = modes.Request(torch.float32, OPTIONS)


def switchable(model, *adapters):
    made = modes.build_switchable(base_of(model), adapters, adapters, REQUEST)
    return made.exported.programs["model.onnx"], made.exported


@pytest.mark.parametrize("name", MODELS)
def test_switchable_graph_computes_the_base_model_and_each_adapter(name, tmp_path):
    model, tokens = make(name), some_tokens()
    adapters = adapter_for(model, 1), adapter_for(model, 2)
    program, exported = switchable(model, *adapters)

    found = decoded(program, tokens, tmp_path)

    base = oracle(model, tokens)
    assert distance(found, base) < EXACT
    for adapter in adapters:
        feeds = exported.feeds[adapter.name]
        expected = oracle(model, tokens, adapter)
        assert distance(decoded(program, tokens, tmp_path, **feeds), expected) < EXACT
        assert distance(base, expected) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_folded_graph_computes_the_adapter_in_as_many_nodes_as_the_base(name, tmp_path):
    model, tokens = make(name), some_tokens()
    adapter = adapter_for(model, 1, "proj" if name != "phi" else "fc")
    made = modes.build_folded(base_of(model), adapter, REQUEST, untie=False)
    program = made.exported.programs["model.onnx"]

    assert distance(decoded(program, tokens, tmp_path), oracle(model, tokens, adapter)) < EXACT
    assert len(program.graph) == len(base_graph(model, torch.float32, OPTIONS).program.graph)


@pytest.mark.parametrize("name", MODELS)
def test_each_row_of_a_bank_has_its_own_adapter(name, tmp_path):
    model, tokens = make(name), some_tokens(rows=3)
    adapters = adapter_for(model, 1), adapter_for(model, 2)
    made = modes.build_bank(base_of(model), adapters, adapters, REQUEST)
    exported = made.exported
    rows = [to_row(exported.feeds[each], exported.layout) for each in ("base", "tuned1", "tuned2")]

    found = decoded(
        exported.programs["model.onnx"],
        tokens,
        tmp_path,
        propulsion_bank=np.stack(rows),
        adapter_ids=np.array([2, 0, 1]),
    )

    for row, adapter in enumerate((adapters[1], None, adapters[0])):
        expected = oracle(model, tokens[row : row + 1], adapter)
        assert distance(found[row : row + 1], expected) < EXACT


def test_a_row_with_another_rows_adapter_is_caught(tmp_path):
    model, tokens = make("llama"), some_tokens()
    adapters = adapter_for(model, 1), adapter_for(model, 2)
    made = modes.build_bank(base_of(model), adapters, adapters, REQUEST)
    exported = made.exported
    rows = [to_row(exported.feeds[each], exported.layout) for each in ("tuned1", "tuned2")]
    program, ids = exported.programs["model.onnx"], np.array([1])
    found = decoded(program, tokens, tmp_path, propulsion_bank=np.stack(rows), adapter_ids=ids)
    assert distance(found, oracle(model, tokens, adapters[0])) > 0.1


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_each_placement_alone_is_exact(name, placement, tmp_path):
    model, tokens = make(name), some_tokens()
    adapter = adapter_for(model, 3, placement)
    assert adapter.scales
    program, exported = switchable(model, adapter)
    found = decoded(program, tokens, tmp_path, **exported.feeds[adapter.name])
    assert distance(found, oracle(model, tokens, adapter)) < EXACT


def test_a_scale_behind_the_wrong_node_is_caught(tmp_path, monkeypatch):
    swapped = nodes._LINEARS | {"mlp.gate_proj": "mlp/up_proj", "mlp.up_proj": "mlp/gate_proj"}
    monkeypatch.setattr(nodes, "_LINEARS", swapped)
    model, tokens = make("llama"), some_tokens()
    adapter = adapter_for(model, 1, "mlp.gate_proj")
    program, exported = switchable(model, adapter)
    found = decoded(program, tokens, tmp_path, **exported.feeds[adapter.name])
    assert distance(found, oracle(model, tokens, adapter)) > 0.1


def test_scales_of_another_order_are_caught(tmp_path):
    model, tokens = make("llama"), some_tokens()
    adapter = adapter_for(model, 1)
    program, exported = switchable(model, adapter)
    wrong = np.roll(exported.feeds[adapter.name]["propulsion_scales"], 16)
    found = decoded(program, tokens, tmp_path, propulsion_scales=wrong)
    assert distance(found, oracle(model, tokens, adapter)) > 0.1


def test_an_input_scale_acts_before_the_layer(tmp_path):
    model, tokens = make("llama-biases"), some_tokens()
    chooser = np.random.default_rng(5)
    path = "model.layers.1.mlp.down_proj"
    adapter = Adapter("ia3", scales={path: Scale(chooser.uniform(0.5, 1.5, 96), "input")})
    program, exported = switchable(model, adapter)
    found = decoded(program, tokens, tmp_path, **exported.feeds["ia3"])
    assert distance(found, oracle(model, tokens, adapter)) < EXACT


def test_the_base_model_stays_as_it_is():
    model = make("phi3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    paths = [path for path, _ in model.named_modules()]
    adapter = adapter_for(model)

    modes.build_folded(base_of(model), adapter, REQUEST, untie=False)

    assert [path for path, _ in model.named_modules()] == paths
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
