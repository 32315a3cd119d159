"""A written graph has its weights beside it, and what runtimes read early inside."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from propulsion_export.errors import ArtifactError
from propulsion_export.graph.files import external_files, read_graph, write_graph, write_graphs
from propulsion_export.runners.onnxruntime import onnxruntime_runner

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


# Several graphs


def holding(**weights):
    """A graph that returns its weights, plus nothing."""
    nodes, initializers = [], []
    for name, values in weights.items():
        tensor = ir.tensor(values, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        node = ir.node("Identity", [value])
        node.outputs[0].name, node.outputs[0].type = f"{name}.out", value.type
        node.outputs[0].shape = tensor.shape
        initializers.append(value)
        nodes.append(node)
    ends = [node.outputs[0] for node in nodes]
    body = ir.Graph(
        [], ends, nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="main"
    )
    return ir.Model(body, ir_version=10)


def read(directory, name):
    model = onnx.load(directory / name)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def random_weight(seed=0, shape=(256, 128)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def data_size(directory):
    return (directory / "model.onnx.data").stat().st_size


def test_weight_that_several_graphs_have_is_on_disk_once(tmp_path):
    shared, first, second = map(random_weight, range(3))
    models = {
        "one.onnx": holding(shared=shared, first=first),
        "two.onnx": holding(second=second, again=shared.copy(), third=first[::-1].copy()),
    }

    write_graphs(models, tmp_path)

    assert data_size(tmp_path) == 4 * shared.nbytes
    one, two = read(tmp_path, "one.onnx"), read(tmp_path, "two.onnx")
    np.testing.assert_array_equal(one["shared"], shared)
    np.testing.assert_array_equal(one["first"], first)
    np.testing.assert_array_equal(two["again"], shared)
    np.testing.assert_array_equal(two["second"], second)
    np.testing.assert_array_equal(two["third"], first[::-1])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model.onnx.data", "one.onnx", "two.onnx"
    ]  # fmt: skip


def test_weight_that_one_graph_has_twice_is_on_disk_once(tmp_path):
    weight = random_weight()

    path = write_graph(holding(a=weight, b=weight.copy()), tmp_path)

    assert data_size(tmp_path) == weight.nbytes
    for values in read(tmp_path, path.name).values():
        np.testing.assert_array_equal(values, weight)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(
            np.zeros((256, 128), np.float32), np.zeros((128, 256), np.float32), id="turned"
        ),
        pytest.param(np.zeros(32768, np.float32), np.zeros((1, 32768), np.float32), id="flat"),
        pytest.param(
            np.zeros((*[1] * 40, 32768), np.float32),
            np.zeros((*[1] * 41, 128, 256), np.float32),
            id="long-shapes-that-begin-alike",
        ),
        pytest.param(np.zeros(32768, np.float32), np.zeros(32768, np.int32), id="float-int"),
        pytest.param(np.zeros(65536, np.float16), np.zeros(32768, np.float32), id="half"),
        pytest.param(
            np.full(65536, 1.5, np.float16),
            np.full(65536, 1.5, np.float16).view(ml_dtypes.bfloat16),
            id="float16-bfloat16",
        ),
        pytest.param(np.zeros(131072, np.int8), np.zeros(131072, np.bool_), id="int8-bool"),
    ],
)  # fmt: skip
def test_equal_bytes_of_another_shape_or_type_are_not_taken_for_each_other(one, other, tmp_path):
    assert one.tobytes() == other.tobytes()

    write_graphs({"a.onnx": holding(w=one), "b.onnx": holding(w=other)}, tmp_path)

    for name, values in (("a.onnx", one), ("b.onnx", other)):
        stored = onnx.load(tmp_path / name).graph.initializer[0]
        assert tuple(stored.dims) == values.shape
        assert stored.data_type == onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        assert onnx.numpy_helper.to_array(stored).tobytes() == values.tobytes()


def test_weights_that_share_bytes_run_in_their_own_shapes(tmp_path):
    weight = random_weight()
    write_graphs(
        {"a.onnx": holding(w=weight), "b.onnx": holding(w=weight.reshape(128, 256))}, tmp_path
    )

    found = {
        name: onnxruntime_runner(tmp_path / name)({})["w.out"] for name in ("a.onnx", "b.onnx")
    }

    assert data_size(tmp_path) == weight.nbytes
    np.testing.assert_array_equal(found["a.onnx"], weight)
    np.testing.assert_array_equal(found["b.onnx"], weight.reshape(128, 256))


def test_there_is_no_file_of_weights_when_none_is_large(tmp_path):
    write_graphs({"a.onnx": holding(w=np.ones(7, np.float32)), "b.onnx": holding()}, tmp_path)

    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    assert read(tmp_path, "a.onnx")["w"].tolist() == [1] * 7


@pytest.mark.parametrize(
    ("elements", "location"), [(16383, None), (16384, "model.onnx.data")], ids=["below", "at"]
)
def test_weights_of_64_kilobytes_and_more_lie_beside_the_graph(elements, location, tmp_path):
    path = write_graph(holding(w=np.ones(elements, np.float32)), tmp_path)

    assert locations(path) == {"w": location}


def test_small_tensors_are_in_every_graph_that_has_them(tmp_path):
    small, large = np.arange(5, dtype=np.int64), random_weight()

    write_graphs(
        {"a.onnx": holding(s=small, w=large), "b.onnx": holding(w=large, s=small)}, tmp_path
    )

    for name in ("a.onnx", "b.onnx"):
        assert locations(tmp_path / name) == {"s": None, "w": "model.onnx.data"}
        np.testing.assert_array_equal(read(tmp_path, name)["s"], small)


def test_transposed_weight_is_written_as_it_is_read(tmp_path):
    """Its bytes in memory are those of another matrix."""
    weight = random_weight()

    write_graphs({"a.onnx": holding(w=weight.T), "b.onnx": holding(w=weight)}, tmp_path)

    assert data_size(tmp_path) == 2 * weight.nbytes
    np.testing.assert_array_equal(read(tmp_path, "a.onnx")["w"], weight.T)
    np.testing.assert_array_equal(read(tmp_path, "b.onnx")["w"], weight)


def redirected(directory, location):
    """The same graph with its first weight kept at another place."""
    model = ir.load(directory / "model.onnx")
    value = model.graph.initializers["weight"]
    old = value.const_value
    value.const_value = ir.ExternalTensor(
        location, old.offset, old.length, old.dtype, shape=old.shape, name=old.name
    )
    ir.save(model, directory / "model.onnx")


def test_weights_stay_in_their_file_beside_the_graph(folded):
    model = read_graph(folded().directory)

    assert external_files(model) == ("model.onnx.data",)


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "a/../../b", "a/../b"])
def test_weights_outside_the_directory_are_refused(folded, location):
    directory = folded().directory
    redirected(directory, location)

    with pytest.raises(ArtifactError, match=f"keeps weights in '{location}'"):
        read_graph(directory)


def test_a_link_that_leads_out_of_the_directory_is_refused(folded, tmp_path):
    directory = folded().directory
    (directory / "model.onnx.data").rename(tmp_path / "elsewhere")
    (directory / "model.onnx.data").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ArtifactError, match=r"keeps weights in 'model\.onnx\.data'"):
        read_graph(directory)


CONSTANT = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x) => (float[batch, 2] y) {
    c = Constant <value = float[1] {3.0}> ()
    y = Mul (x, c)
}
"""


def test_a_constant_of_a_node_can_escape_no_more_than_an_initializer(tmp_path):
    model = ir.from_onnx_text(CONSTANT)
    node = model.graph[0]
    old = node.attributes["value"].value
    moved = ir.ExternalTensor("../x", 0, 4, old.dtype, shape=old.shape, name="c")
    node.attributes["value"] = ir.AttrTensor("value", moved)
    ir.save(model, tmp_path / "model.onnx")

    with pytest.raises(ArtifactError, match=r"keeps weights in '\.\./x'"):
        read_graph(tmp_path)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff not a graph")

    with pytest.raises(ArtifactError, match="is no ONNX file"):
        read_graph(tmp_path)
