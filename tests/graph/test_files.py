"""A written graph has its weights beside it, and what runtimes read early inside."""

import numpy as np
import onnx
import onnx_ir as ir

from propulsion_export.graph.files import write_graph
from propulsion_export.runners import onnxruntime_runner

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[n, 256] x) => (float[n, 2, 128] y) <int64[3] shape = {-1, 2, 128}> {
    product = MatMul (x, weight)
    y = Reshape (product, shape)
}
"""
WEIGHT = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)


def graph():
    text = GRAPH.replace("[n, 256] x)", "[n, 256] x, float[256, 256] weight)")
    model = ir.from_onnx_text(text)
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(WEIGHT, name="weight")
    model.graph.register_initializer(weight)
    return model


def locations(path):
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}.get("location")
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    }


def test_large_weights_lie_beside_the_graph_and_small_tensors_inside(tmp_path):
    path = write_graph(graph(), tmp_path)

    assert path == tmp_path / "model.onnx"
    assert locations(path) == {"weight": "model.onnx.data", "shape": None}
    assert (tmp_path / "model.onnx.data").stat().st_size >= WEIGHT.nbytes
    assert path.stat().st_size < 64 * 1024


def test_written_graph_runs_also_where_it_is_moved_to(tmp_path):
    (tmp_path / "here").mkdir()
    write_graph(graph(), tmp_path / "here")
    moved = (tmp_path / "here").rename(tmp_path / "there")
    x = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)

    found = onnxruntime_runner(moved / "model.onnx")({"x": x})["y"]

    np.testing.assert_allclose(found, (x @ WEIGHT).reshape(3, 2, 128), rtol=1e-4, atol=1e-4)


def test_written_graph_says_who_made_it_and_passes_the_checker(tmp_path):
    path = write_graph(graph(), tmp_path)

    onnx.checker.check_model(path, full_check=True)
    assert onnx.load(path, load_external_data=False).producer_name == "propulsion-export"
