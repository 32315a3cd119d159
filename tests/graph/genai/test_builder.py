"""The builder is quiet, leaves the model alone, and fails in one line."""

import logging
import sys

import pytest
from genai_models import make

from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.graph.genai.builder import build_graph
from propulsion_export.graph.genai.options import GenaiOptions


def test_nothing_is_printed_or_logged(capfd):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    build_graph(make("gemma2"), "float32", GenaiOptions(bits=4))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert (root.level, root.handlers) == before


def test_weights_are_those_of_the_model_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make("llama")
    model.config._name_or_path = "no/such/model"
    graph = build_graph(model, "float32", GenaiOptions())
    weight = graph.program.graph.initializers["model.layers.1.mlp.down_proj.MatMul.weight"]
    own = model.model.layers[1].mlp.down_proj.weight
    assert (weight.const_value.numpy() == own.numpy().T).all()
    assert not list(tmp_path.iterdir())


def test_a_graph_without_a_cache_is_refused():
    with pytest.raises(ToolError, match=r"no node .* computes present\.0\.key and 3 more outputs"):
        build_graph(make("llama"), "float32", GenaiOptions("cuda"))


def test_an_architecture_that_it_does_not_know_is_refused(tiny_model):
    with pytest.raises(ToolError, match=r"GPT2LMHeadModel: .* does not know this architecture"):
        build_graph(tiny_model("gpt2"), "float32", GenaiOptions())
    with pytest.raises(ToolError, match=r"Gemma3ForCausalLM: .* rope settings"):
        build_graph(tiny_model("gemma3"), "float32", GenaiOptions())


def test_heads_that_no_cpu_kernel_computes_are_refused(tiny_model):
    with pytest.raises(ToolError, match=r"heads of 8 .* multiples of 16 only"):
        build_graph(tiny_model("llama"), "float32", GenaiOptions())


def test_a_failure_inside_the_builder_is_one_line():
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 80,
    }
    with pytest.raises(ToolError, match=r"builder failed \(\w+Error.*--exporter transf") as caught:
        build_graph(make("llama", rope_parameters=yarn), "float32", GenaiOptions())
    assert "\n" not in str(caught.value)


def test_without_the_package_this_machine_cannot(monkeypatch):
    for name in [each for each in sys.modules if each.startswith("onnxruntime_genai")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(
        UnavailableError, match=r"pip install 'propulsion-export\[genai\]'"
    ) as caught:
        build_graph(make("llama"), "float32", GenaiOptions())
    assert caught.value.exit_code == 3
