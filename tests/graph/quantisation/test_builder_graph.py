"""The graph that onnxruntime-genai's builder quantises by itself: read, and folded into."""

import copy
import logging

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from propulsion_export.graph.passes.constants import add_constant
from propulsion_export.graph.quantisation import FoldScales, Part, dequantise, quantised_weights

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = "/model/layers.0"
QKV = f"{LAYER}/attn/qkv_proj/MatMul"
PLACES = {
    "q_proj": [Part(QKV, 0, 64)],
    "k_proj": [Part(QKV, 64, 96)],
    "v_proj": [Part(QKV, 96)],
    "gate_proj": [Part(f"{LAYER}/mlp/gate_proj/MatMul")],
}
NORM = f"{LAYER}/post_attention_layernorm/SkipLayerNorm"


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", "text-generation", **SIZES)


@pytest.fixture(scope="module", params=[4, 8])
def built(model, request):
    builder = pytest.importorskip("onnxruntime_genai.models.builders", reason="a graph is built")
    logging.getLogger().handlers.clear()  # the import logs everything of everyone
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    extra = {"is_symmetric": True, "block_size": 32, "accuracy_level": 1}
    kind = ir.DataType.INT4 if request.param == 4 else ir.DataType.INT8
    # The builder takes the model apart.
    methods = {"load_weights": lambda maker, path: copy.deepcopy(model)}
    llama = type("LlamaModel", (builder.LlamaModel,), methods)
    maker = llama(config, ir.DataType.FLOAT, kind, "cpu", "", extra)
    maker.make_model("")
    program = maker.to_nbits()
    program.graph.sort()
    return request.param, program


def scaled(program):
    """A copy of the graph with a multiply behind the packed projection and behind a norm."""
    clone = program.clone()
    for name, node, width in (("qkv", QKV, 128), ("norm", NORM, 64)):
        found = next(each for each in clone.graph if str(each.name).startswith(node))
        value = found.outputs[0]
        scale = add_constant(clone.graph, name, np.ones(width, np.float32))
        users = list(value.uses())
        multiply = ir.node("Mul", [value, scale])
        for user, index in users:
            user.replace_input_with(index, multiply.outputs[0])
        clone.graph.insert_after(found, multiply)
    return clone


def run(program):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = ir.serde.serialize_model(program).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feeds = {
        each.name: np.zeros((1, each.shape[1], 0, 16), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }
    ids = np.array([[11, 42, 7, 65, 23]])
    return session.run(
        ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **feeds}
    )[0]


def test_packed_weights_are_read_as_parameters(built, model):
    bits, program = built

    read = quantised_weights(program, PLACES)

    layer = model.model.layers[0]
    own = {name: getattr(layer.self_attn, name, None) for name in PLACES}
    own["gate_proj"] = layer.mlp.gate_proj
    for name, module in own.items():
        expected = module.weight.numpy()
        assert read[name].integers.shape == expected.shape
        step = np.abs(expected).max() / 2 ** (bits - 1)
        assert np.abs(dequantise(read[name]) - expected).max() <= step * 1.01


def test_folding_into_the_packed_projection_and_a_norm_is_the_multiply(built):
    _, program = built
    numbers = np.random.default_rng(0)
    values = {"qkv": numbers.normal(size=128), "norm": numbers.normal(size=64)}
    values["qkv"][5] = 0
    multiplied = scaled(program)
    for name, factors in values.items():
        constant = multiplied.graph.initializers[name]
        constant.const_value = ir.tensor(factors.astype(np.float32), name=name)
    folding = FoldScales(values)

    folded = folding(scaled(program)).model

    assert folding.multiplied == []
    assert len(list(folded.graph)) == len(list(program.graph))
    np.testing.assert_allclose(run(folded), run(multiplied), atol=2e-5)
    assert np.abs(run(folded) - run(program)).max() > 1e-2
    before, after = quantised_weights(program, PLACES), quantised_weights(folded, PLACES)
    for name in PLACES:
        assert before[name].integers.tobytes() == after[name].integers.tobytes()
