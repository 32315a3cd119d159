"""The verdict on graphs of onnxruntime-genai's builder: right ones pass, planted mistakes fail."""

import re
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from genai_toys import KINDS

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.graph.files import read_graph
from propulsion_export.pipeline.parity import check_parity


def failed(report):
    return {(check.case, check.adapter) for check in report.checks if not check.passed}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("llama", "bank"),
        ("llama", "switchable"),
        ("llama", "folded"),
        # PyTorch itself cannot be judged with lfm2's states, see `base_model.caches`.
        *((kind, "bank") for kind in KINDS[1:] if kind != "lfm2"),
    ],
)
def test_right_artifact_passes_every_case(kind, mode, genai_artifact):
    report = check_parity(genai_artifact(kind, mode))

    assert failed(report) == set()
    cases = {check.case for check in report.checks}
    assert cases >= {"parity", "padding", "recomputing", "right padding", "greedy"}
    assert ("mixed" in cases) == (mode == "bank")
    assert "padding inside" not in cases
    notes = [check.detail for check in report.checks if check.case == "right padding"]
    assert all("the graph reads no padding inside a row" in note for note in notes)


@pytest.fixture
def planted(genai_artifact, tmp_path):
    """`planted(kind, change, mode)`: an artifact whose graph `change(graph)` has been changed."""

    def make(kind, change, mode="switchable"):
        directory = shutil.copytree(genai_artifact(kind, mode), tmp_path / "planted")
        graph = ir.external_data.load_to_model(read_graph(directory))
        change(graph.graph)
        for file in directory.glob("model.onnx*"):
            file.unlink()
        ir.save(graph, directory / "model.onnx")
        manifest = Artifact.read(genai_artifact(kind, mode)).manifest
        Artifact.write(directory, manifest)
        return directory

    return make


def node(graph, pattern):
    return next(each for each in graph if re.fullmatch(pattern, each.name or ""))


def swap_query_and_key(graph):
    """Of the first layer; the key's scale has half the width, so the query's first half."""
    product = node(graph, r"/model/layers\.0/attn/qkv_proj/MatMul/output_0/propulsion/Mul")
    order = np.r_[64:96, 32:64, 0:32, 96:128].astype(np.int64)
    indices = ir.Value(
        name="order", const_value=ir.tensor(order, name="order"), shape=ir.Shape([128]),
        type=ir.TensorType(ir.DataType.INT64),
    )  # fmt: skip
    graph.register_initializer(indices)
    gather = ir.node("Gather", [product.inputs[1], indices], {"axis": -1})
    product.replace_input_with(1, gather.outputs[0])
    graph.insert_before(product, gather)


def drop_one_scale(graph):
    product = node(graph, r"/model/layers\.1/mlp/up_proj/MatMul/output_0/propulsion/Mul")
    ir.convenience.replace_all_uses_with(product.outputs[0], product.inputs[0])
    graph.remove(product, safe=True)


def scale_the_residual(graph):
    """The sum that goes on to the next layer, with the scale of this layer's projection."""
    norm = node(graph, r"/model/layers\.0/post_attention_layernorm/SkipLayerNorm")
    scale = node(graph, r"/model/layers\.0/attn/o_proj/MatMul/output_0/propulsion/Mul").inputs[1]
    residual, users = norm.outputs[3], list(norm.outputs[3].uses())
    product = ir.node("Mul", [residual, scale])
    graph.insert_after(norm, product)
    for user, index in users:
        user.replace_input_with(index, product.outputs[0])


def halve_the_window(graph):
    attention = node(graph, r"/model/layers\.0/attn/GroupQueryAttention")
    attention.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 4)


@pytest.mark.parametrize(
    ("kind", "mistake", "cases"),
    [
        ("llama", swap_query_and_key, {"parity", "effect"}),
        ("llama", drop_one_scale, {"parity"}),
        ("llama", scale_the_residual, {"parity"}),
    ],
)
def test_mistake_about_the_scales_fails(kind, mistake, cases, planted):
    report = check_parity(planted(kind, mistake))

    found = failed(report)
    assert found >= {(case, name) for case in cases for name in ("one", "two")}
    assert "base" not in {name for _, name in found}  # the base model has scales of one


def test_wrong_window_fails_for_the_base_model_too(planted):
    report = check_parity(planted("gemma2", halve_the_window))

    assert failed(report) >= {("parity", name) for name in ("base", "one", "two")}


def test_a_table_of_positions_that_ends_too_early_fails_in_a_quick_verdict_too(planted):
    def end_early(graph):
        cosines = graph.initializers["cos_cache"]
        values = cosines.const_value.numpy().copy()
        values[-40:] = 0
        cosines.const_value = ir.tensor(values, name=cosines.name)

    report = check_parity(planted("llama", end_early), effort="quick")

    assert failed(report) == {("tables", "all")}
    (found,) = [check.detail for check in report.checks if check.case == "tables"]
    assert found.startswith("cosines of model.rotary_emb: 40 of ")


def test_adapter_that_is_dropped_or_another_fails(genai_artifact, tmp_path):
    right = genai_artifact("llama") / "adapters"
    directory = shutil.copytree(right.parent, tmp_path / "planted")
    for planted, source in (("one", "base"), ("two", "one")):
        file = directory / "adapters" / f"{planted}.safetensors"
        shutil.copyfile(right / f"{source}.safetensors", file)
    Artifact.write(directory, Artifact.read(right.parent).manifest)

    found = failed(check_parity(directory))

    assert found >= {(case, name) for case in ("parity", "effect") for name in ("one", "two")}
    assert "base" not in {name for _, name in found}
