import onnx_ir as ir
import pytest

from propulsion_export.base_model.config import read_settings
from propulsion_export.engine.operators import check_operators
from propulsion_export.errors import ArtifactError, UnavailableError
from propulsion_export.graph.files import external_files, read_graph
from propulsion_export.graph.passes.required_inputs import require_inputs_


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


def test_a_constant_of_a_node_can_escape_no_more_than_an_initializer(tmp_path, graph):
    model = graph(CONSTANT)
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


def test_an_optional_input_becomes_a_required_one(switchable):
    model = read_graph(switchable().directory)

    require_inputs_(model)

    assert [value.name for value in model.graph.inputs][-1] == "propulsion_scales"
    assert "propulsion_scales" not in model.graph.initializers
    assert "weight" in model.graph.initializers


def test_an_input_named_constant_becomes_a_weight(switchable):
    model = read_graph(switchable().directory)

    require_inputs_(model, constant=["propulsion_scales"])

    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask"]
    assert "propulsion_scales" in model.graph.initializers


def test_dimensions_written_as_digits_become_numbers(graph):
    model = graph(CONSTANT)
    model.graph.inputs[0].shape = ir.Shape(["batch", "2"])

    require_inputs_(model)

    assert [str(size) for size in model.graph.inputs[0].shape] == ["batch", "2"]
    assert model.graph.inputs[0].shape[1] == 2


CONSTANT = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x) => (float[batch, 2] y) {
    c = Constant <value = float[1] {3.0}> ()
    y = Mul (x, c)
}
"""


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("[1]", "is a list, expected settings by name")]
)
def test_a_damaged_configuration_is_an_error_and_none_is_not(tmp_path, text, message):
    assert read_settings(tmp_path) == {}

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_settings(tmp_path)


ADDING = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[4] counts, int64[9] experts, float[9] ones) => (float[4] counted) {
    [count] counted = ScatterElements <axis = 0, reduction = "add"> (counts, experts, ones)
}
"""


@pytest.mark.parametrize("reduction", ["", ', reduction = "none"'])
def test_a_scatter_that_adds_is_refused_by_the_names_of_model_and_node(reduction):
    check_operators(ir.from_onnx_text(ADDING.replace(', reduction = "add"', reduction)), "Tiny")

    with pytest.raises(UnavailableError, match=r"Tiny: its node 'count'.*ONNX Runtime") as refusal:
        check_operators(ir.from_onnx_text(ADDING), "Tiny")

    assert refusal.value.exit_code == 3
