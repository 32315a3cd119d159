"""What the builder gets wrong is right after mending, and would be refused without."""

import pytest
import torch
from genai_models import make

from propulsion_export.errors import ToolError
from propulsion_export.graph.genai import base as base_module
from propulsion_export.graph.genai import builder
from propulsion_export.graph.genai.base import base_graph
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.parity.built_graph import check_built_graph

WRONG = [
    pytest.param("phi", {}, id="epsilon-of-phi"),
    pytest.param("nemotron", {"mlp_bias": False}, id="epsilon-of-nemotron"),
    pytest.param("nemotron", {}, id="biases-of-nemotron"),
    pytest.param("gemma", {}, id="factor-of-gemma"),
    pytest.param("gemma2", {}, id="factor-of-gemma2"),
    pytest.param("mistral-windowed", {}, id="window-of-mistral"),
    pytest.param("phi3-windowed", {}, id="window-of-phi3"),
    pytest.param("llama-linear", {}, id="linear-rope-of-llama"),
    pytest.param("olmo", {}, id="norms-of-olmo"),
]


@pytest.mark.parametrize(("name", "settings"), WRONG)
def test_a_mended_graph_is_the_model(name, settings):
    model = make(name, **settings)
    graph = base_graph(model, torch.float32, GenaiOptions())
    check_built_graph(model, graph.program)


@pytest.mark.parametrize(("name", "settings"), WRONG)
def test_without_mending_the_graph_is_refused(name, settings, monkeypatch):
    monkeypatch.setattr(builder, "mend_builder_", lambda maker: None)
    monkeypatch.setattr(builder, "_LLAMA_SKIPS", ())
    monkeypatch.setattr(base_module, "mend_graph_", lambda *arguments: None)
    model = make(name, **settings)
    graph = base_graph(model, torch.float32, GenaiOptions())
    with pytest.raises(ToolError, match=r"not the model|has a window.*--exporter transformers"):
        check_built_graph(model, graph.program)


def test_what_no_attribute_mends_is_refused_before_any_work():
    model = make("phi", qk_layernorm=True)
    with pytest.raises(ToolError, match="leaves out the norms of queries and keys"):
        base_graph(model, torch.float32, GenaiOptions())
    model = make("smollm3", no_rope_layers=[1, 0])
    with pytest.raises(ToolError, match="layers without rotary embedding"):
        base_graph(model, torch.float32, GenaiOptions())


def test_what_is_only_found_by_computing_is_refused_by_name():
    model = make("olmo", clip_qkv=0.5)
    graph = base_graph(model, torch.float32, GenaiOptions())
    with pytest.raises(ToolError, match=r"OlmoForCausalLM: the graph .* is not the model"):
        check_built_graph(model, graph.program)
