"""Where scales and biases stand in a builder's graph."""

import numpy as np
import pytest
import torch
from genai_models import adapter_for, base_of, decoded, distance, make, oracle, some_tokens

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.errors import AdapterError, UsageError
from propulsion_export.graph.genai import modes
from propulsion_export.graph.genai.options import GenaiOptions


def built(model, adapter, *, dtype=torch.float32, **options):
    made = modes.build_switchable(
        base_of(model), [adapter], [adapter], modes.Request(dtype, GenaiOptions(**options))
    )
    return made.exported.programs["model.onnx"], made.exported


def multiplies(program):
    """The names of the values that are scaled."""
    return [
        node.outputs[0].name
        for node in program.graph
        if node.op_type == "Mul" and "propulsion" in node.name
    ]


def test_packed_projections_have_one_multiply_by_one_slice():
    model = make("llama")
    program, exported = built(model, adapter_for(model, only="self_attn.q_proj"))
    assert multiplies(program) == [
        f"/model/layers.{layer}/attn/qkv_proj/MatMul/output_0" for layer in (0, 1)
    ]
    split = next(node for node in program.graph if node.op_type == "Split")
    assert len(split.outputs) == 2
    assert not any(node.op_type == "Concat" and "propulsion" in node.name for node in program.graph)
    paths = [slot.path.rpartition(".")[2] for slot in exported.layout["propulsion_scales"]]
    assert paths == ["q_proj", "k_proj", "v_proj"] * 2


def test_slots_beside_those_of_an_adapter_hold_the_base_models_values(tmp_path):
    model, tokens = make("llama-biases"), some_tokens()
    adapter = adapter_for(model, only="self_attn.v_proj")
    program, exported = built(model, adapter)
    feeds = exported.feeds[adapter.name]
    assert (feeds["propulsion_scales"][: 64 + 32] == 1).all()
    found = decoded(program, tokens, tmp_path, **feeds)
    assert distance(found, oracle(model, tokens, adapter)) < 1e-5


def test_a_packed_gate_and_up_projection_has_two_multiplies():
    model = make("phi3")
    program, exported = built(model, adapter_for(model, only="layers.0.mlp.gate_up_proj"))
    assert multiplies(program) == [
        "/model/layers.0/mlp/gate_proj/MatMul/output_0",
        "/model/layers.0/mlp/up_proj/MatMul/output_0",
    ]
    assert [slot.length for slot in exported.layout["propulsion_scales"]] == [192]


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "phi"])
def test_a_bias_of_zeros_that_the_builder_left_out_can_be_trained(name, tmp_path):
    model, tokens = make(name), some_tokens()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias") and "norm" not in path:
                parameter.zero_()
    adapter = adapter_for(model)
    program, exported = built(model, adapter)
    found = decoded(program, tokens, tmp_path, **exported.feeds[adapter.name])
    assert distance(found, oracle(model, tokens, adapter)) < 1e-5


def test_the_residual_sum_of_a_norm_is_not_scaled():
    model = make("llama")
    program, _ = built(model, adapter_for(model, only="post_attention_layernorm"))
    assert multiplies(program) == [
        f"/model/layers.{layer}/post_attention_layernorm/output_0" for layer in (0, 1)
    ]


def test_a_saved_module_is_refused_by_name():
    model = make("llama")
    head = model.lm_head.weight.double().numpy() * 2
    adapter = Adapter("head", scales={}, modules={"lm_head.weight": head})
    with pytest.raises(AdapterError, match=r"lm_head\.weight: is saved whole.*transformers"):
        built(model, adapter)


def test_an_input_that_is_packed_is_refused_by_name():
    model = make("llama")
    path = "model.layers.0.self_attn.q_proj"
    adapter = Adapter("ia3", scales={path: Scale(np.full(64, 0.5), "input")})
    with pytest.raises(AdapterError, match=r"q_proj: has an input that .* packs with others"):
        built(model, adapter)


@pytest.mark.parametrize("provider", ["cuda", "webgpu"])
def test_norms_inside_the_attention_node_are_refused_by_name(provider):
    model = make("qwen3")
    adapter = adapter_for(model, only="layers.0.self_attn.q_norm")
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_norm: has no node"):
        built(model, adapter, dtype=torch.float16, execution_provider=provider)


@pytest.mark.parametrize(
    ("provider", "dtype", "bits", "each_layer"),
    [
        pytest.param("cuda", "float16", None, 5, id="cuda"),
        pytest.param("cuda", "bfloat16", None, 5, id="cuda-bfloat16"),
        pytest.param("cuda", "float16", 4, 5, id="cuda-int4"),
        pytest.param("dml", "float16", None, 7, id="dml"),
        pytest.param("dml", "float16", 4, 7, id="dml-int4"),
        pytest.param("webgpu", "float32", None, 5, id="webgpu"),
        pytest.param("webgpu", "float16", 8, 5, id="webgpu-int8"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_graphs_for_other_providers_have_a_multiply_behind_each_node(
    name, provider, dtype, bits, each_layer
):
    """Only their structure is checked; dml has a node for each projection."""
    model = make(name)
    adapter = adapter_for(model, only="proj")
    program, exported = built(
        model, adapter, dtype=getattr(torch, dtype), execution_provider=provider, bits=bits
    )
    found = multiplies(program)
    assert len(found) == 2 * each_layer
    scaled = {name.removeprefix("/model/layers.").split("/")[2] for name in found}
    packed = {"qkv_proj"} if each_layer == 5 else {"q_proj", "k_proj", "v_proj"}
    assert scaled == packed | {"o_proj", "gate_proj", "up_proj", "down_proj"}
    total = sum(slot.length for slot in exported.layout["propulsion_scales"])
    assert exported.feeds["base"]["propulsion_scales"].shape == (total,)
    producers = {
        node.inputs[0].producer().op_type
        for node in program.graph
        if node.op_type == "Mul" and "propulsion" in node.name
    }
    assert producers == {"MatMul" if bits is None else "MatMulNBits"}


def test_activations_that_a_provider_has_no_kernels_for_are_refused():
    model = make("llama")
    with pytest.raises(UsageError, match=r"--dtype: .* in bfloat16.*--dtype float32"):
        built(model, adapter_for(model), dtype=torch.bfloat16)
