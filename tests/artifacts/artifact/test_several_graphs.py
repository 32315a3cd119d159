"""Artifacts of an encoder and two decoders."""

import pytest
from written_artifacts import SEVERAL, change, refused

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES


@pytest.mark.parametrize("name", [*ENCODER_DECODER_FILES, "config.json"])
def test_an_artifact_of_several_graphs_needs_each_and_the_configuration(several, name):
    """Which token a decoder starts with is in the configuration."""
    (several / name).unlink()
    Artifact.write(several, SEVERAL)

    refused(several, f"{name}: is missing")


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_graph_of_several_without_a_digest_is_refused(several, name):
    change(several, "files", name, drop=True)

    refused(several, f"{name}: has no digest in the manifest")


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_graph_of_several_that_changed_is_refused(several, name):
    (several / name).write_bytes(b"2")

    refused(several, f"{name}: its content is not what the manifest recorded")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_single_graph_put_beside_several_is_refused(several, name):
    (several / name).write_bytes(b"planted")

    refused(several, f"{name}: has no digest in the manifest")


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_graph_put_beside_a_single_one_is_refused(folded, name):
    (folded / name).write_bytes(b"planted")

    refused(folded, f"{name}: has no digest in the manifest")


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("graphs", "decoder_model.onnx"), None, "decoder_model.onnx is None, expected dict"),
        (("graphs", "encoder_model.onnx", "outputs"), {}, "outputs is {}, expected list"),
        (("graphs", "encoder_model.onnx", "more"), 1, "has the unknown field 'more'"),
        (("graphs",), [], r"graphs is \[\], expected dict"),
        (("graphs",), {}, "graphs are none, expected encoder_model.onnx, decoder_model.onnx, "),
        (("graphs", "model.onnx"), {"inputs": [], "outputs": []}, "model.onnx, expected encoder_"),
        (("task",), "text-generation", "graphs are encoder_model.onnx, .*, expected none"),
        (("kind",), "merged", "graphs are encoder_model.onnx, .*, expected none"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_graphs_that_are_not_those_of_the_task_are_refused(several, path, value, match):
    change(several, *path, to=value)

    refused(several, match)


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_manifest_without_one_of_the_graphs_is_refused(several, name):
    change(several, "graphs", name, drop=True)

    refused(several, "graphs are .*, expected encoder_model.onnx, decoder_model.onnx, decoder_with")


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_several_graphs_have_no_inputs_and_outputs_of_their_own_besides(several, field):
    """Nothing would hold them against a graph."""
    spec = {"name": "x", "dtype": "int64", "shape": [1], "optional": False}
    change(several, field, to=[spec])

    refused(several, "inputs and outputs are given beside several graphs, expected none")


def test_a_manifest_from_before_there_were_several_graphs_can_be_read(folded):
    change(folded, "graphs", drop=True)

    assert Artifact.read(folded).manifest.graphs == {}


def test_several_graphs_are_where_their_directory_is(several):
    assert Artifact.read(several).path == several
