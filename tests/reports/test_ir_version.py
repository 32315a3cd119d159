"""A graph declared as IR version 10 is refused by servers that could run its operators."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.graph.files import write_graph, write_graphs
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.package import package
from propulsion_export.runners.onnxruntime import onnxruntime_runner

GRAPH = """
<ir_version: 10, opset_import: ["" : OPSET]>
graph (float[n, 2] x) => (float[n, 2] y) <float[2] scale = {2.0, 3.0}> {
    y = Mul (x, scale)
}
"""


def graph(opset=20, extra=None):
    """A graph with the exporter's notes; `extra`: the type of one more initializer."""
    model = ir.from_onnx_text(GRAPH.replace("OPSET", str(opset)))
    (node,) = model.graph
    for element in (model.graph, node, node.outputs[0], model.graph.initializers["scale"]):
        element.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/me/model.py"
    if extra is not None:
        tensor = ir.Tensor(np.zeros(2, extra.numpy()), dtype=extra, name="extra")
        model.graph.register_initializer(ir.Value(name="extra", const_value=tensor))
    return model


def declared(path):
    return onnx.load(path, load_external_data=False).ir_version


@pytest.mark.parametrize(
    ("opset", "version"),
    [(15, 8), (17, 8), (18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 11), (24, 12)],
)
def test_the_ir_version_is_the_lowest_of_the_opset(tmp_path, opset, version):
    assert declared(write_graph(graph(opset), tmp_path)) == version


@pytest.mark.parametrize(
    ("dtype", "version"),
    [
        ("BFLOAT16", 8),
        ("FLOAT16", 8),
        ("FLOAT8E4M3FN", 9),
        ("FLOAT8E5M2", 9),
        ("INT4", 10),
        ("UINT4", 10),
        ("FLOAT4E2M1", 11),
        ("FLOAT8E8M0", 12),
        ("INT2", 13),
    ],
)
def test_a_type_of_tensors_may_need_more_than_the_opset(tmp_path, dtype, version):
    assert declared(write_graph(graph(18, ir.DataType[dtype]), tmp_path)) == version


def test_every_type_that_onnx_knows_has_its_ir_version():
    """A type newer than those of IR version 8 must be in the table."""
    from propulsion_export.graph.ir_version import _SINCE

    newer = {dtype.name for dtype in ir.DataType if dtype > ir.DataType.BFLOAT16}

    assert newer == set(_SINCE)


def test_nothing_that_needs_a_later_version_is_written(tmp_path):
    path = write_graph(graph(18), tmp_path)

    onnx.checker.check_model(path, full_check=True)
    assert b"stack_trace" not in path.read_bytes()
    assert b"/home/me" not in path.read_bytes()
    x = np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(onnxruntime_runner(path)({"x": x})["y"], [[2, 3]])


def test_each_graph_of_several_has_its_own(tmp_path):
    write_graphs({"a.onnx": graph(18), "b.onnx": graph(21)}, tmp_path)

    assert (declared(tmp_path / "a.onnx"), declared(tmp_path / "b.onnx")) == (8, 10)


def test_an_export_of_opset_18_is_version_8_and_runs(world, tmp_path):
    directory = tmp_path / "out"
    export_onnx([world.three], directory, opset=18)

    inputs = {
        "input_ids": np.array([[2, 7, 8, 3], [2, 9, 3, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "token_type_ids": np.zeros((2, 4), np.int64),
    }
    logits = onnxruntime_runner(directory / "model.onnx")(inputs)["logits"]
    assert declared(directory / "model.onnx") == 8
    assert logits.shape == (2, 3)
    assert np.ptp(logits) > 0.1


def test_default_exports_and_their_packages_are_version_9(switchable, banked, tmp_path):
    package(banked, tmp_path / "models", layout="triton")

    graphs = [switchable / "model.onnx", banked / "model.onnx", *tmp_path.rglob("model.onnx")]
    assert len(graphs) == 3
    assert {declared(path) for path in graphs} == {9}
    assert Artifact.read(switchable).manifest.kind == "onnx"
