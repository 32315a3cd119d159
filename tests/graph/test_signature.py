"""What a manifest says of several graphs is held against each of them."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.consistency import check_consistent
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    GraphEntry,
    Manifest,
    Slot,
    TensorSpec,
)
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.errors import ArtifactError
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.signature import check_signature, signature
from propulsion_export.pipeline.parity import check_parity

ENCODER, FIRST, LATER = ENCODER_DECODER_FILES
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (int64[batch, sequence] input_ids, float[3] propulsion_scales)
    => (float[batch, sequence, 3] {output}) <float[9, 3] table = {{
    1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9}}> {{
    rows = Gather (table, input_ids)
    {output} = Mul (rows, propulsion_scales)
}}
"""
MANIFEST = Manifest(
    kind="onnx",
    mode="switchable",
    task="text2text-generation",
    dtype="float32",
    base=BaseEntry("some/base", Fingerprint("float32", {"weight": (0.5,) * 8})),
    adapters={"one": AdapterEntry("sha256:00", "adapters/one", 3, "adapters/one.safetensors")},
    layout={SCALES_INPUT: (Slot("a", 0, 2, (2,)), Slot("b", 2, 1, (1,)))},
)


@pytest.fixture
def artifact(tmp_path):
    """Three graphs that all read one packed input of three elements."""
    models = {
        name: ir.from_onnx_text(GRAPH.format(output="hidden" if name == ENCODER else "logits"))
        for name in ENCODER_DECODER_FILES
    }
    (tmp_path / "adapters").mkdir()
    for name in ("base", "one"):
        feeds = {SCALES_INPUT: np.ones(3, np.float32)}
        save_file(feeds, tmp_path / "adapters" / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    write_graphs(models, tmp_path)
    graphs = {name: GraphEntry(*signature(model)) for name, model in models.items()}
    return Artifact.write(tmp_path, replace(MANIFEST, graphs=graphs))


def refused(artifact, match):
    """By the check alone, and by the verdict, with the exit code of a damaged artifact."""
    for check in (check_signature, lambda read: check_parity(read.directory)):
        with pytest.raises(ArtifactError, match=match) as caught:
            check(artifact)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)


def edited(artifact, file, **changes):
    entry = artifact.manifest.graphs[file]
    entry = replace(
        entry, **{name: change(getattr(entry, name)) for name, change in changes.items()}
    )
    return artifact.with_manifest(
        replace(artifact.manifest, graphs={**artifact.manifest.graphs, file: entry})
    )


def test_manifest_of_several_graphs_that_fits_them_is_accepted(artifact):
    check_signature(Artifact.read(artifact.directory))


@pytest.mark.parametrize("file", ENCODER_DECODER_FILES)
def test_manifest_that_differs_from_one_of_the_graphs_is_refused_with_its_name(file, artifact):
    wrong = edited(
        artifact, file, inputs=lambda specs: (replace(specs[0], dtype="int32"), specs[1])
    )

    refused(wrong, rf"{file}: the graph has the input 'input_ids' \(int64 .* \(int32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda specs: specs[:0], "the graph has the output 'logits' .* no such one"),
        (lambda specs: (*specs, replace(specs[0], name="more")), "the output 'more', the graph no"),
        (lambda specs: specs * 2, "names an output twice"),
    ],
    ids=["missing", "more", "twice"],
)
def test_outputs_of_a_later_graph_count_too(change, words, artifact):
    refused(edited(artifact, LATER, outputs=change), f"{LATER}: .*{words}")


def test_graphs_exchanged_are_refused(artifact):
    graphs = artifact.manifest.graphs
    exchanged = {**graphs, ENCODER: graphs[LATER], LATER: graphs[ENCODER]}

    refused(
        artifact.with_manifest(replace(artifact.manifest, graphs=exchanged)),
        f"{ENCODER}: the graph has the output 'hidden'",
    )


def test_dtype_is_that_of_every_graph(artifact):
    refused(
        artifact.with_manifest(replace(artifact.manifest, dtype="float16")),
        f"{LATER}: the graph is in float32, the manifest says float16",
    )


def test_all_graphs_that_differ_are_named_at_once(artifact):
    wrong = edited(artifact, ENCODER, outputs=lambda specs: specs[:0])
    wrong = edited(wrong, LATER, outputs=lambda specs: specs[:0])

    with pytest.raises(ArtifactError) as caught:
        check_signature(wrong)

    assert len(caught.value.findings) == 2


@pytest.mark.parametrize("file", ENCODER_DECODER_FILES)
def test_packed_input_of_every_graph_has_the_whole_layout(file, artifact):
    """Whichever graph is listed last: that of another must not hide it."""
    wrong = edited(artifact, file, inputs=lambda specs: (specs[0], replace(specs[1], shape=(2,))))

    with pytest.raises(ArtifactError, match=r"the layout has 3 elements, the input's shape is .2."):
        check_consistent(wrong.directory, wrong.manifest)


def test_packed_input_that_only_one_graph_has_is_enough(artifact):
    without = artifact
    for file in (ENCODER, FIRST):
        without = edited(without, file, inputs=lambda specs: specs[:1])

    check_consistent(without.directory, without.manifest)
    nowhere = edited(without, LATER, inputs=lambda specs: specs[:1])
    with pytest.raises(ArtifactError, match="has 3 elements, the input's shape is none"):
        check_consistent(nowhere.directory, nowhere.manifest)


@pytest.mark.parametrize("file", ENCODER_DECODER_FILES)
def test_graph_that_is_missing_is_refused(file, artifact):
    (artifact.directory / file).unlink()

    with pytest.raises(ArtifactError, match=f"{file}: is missing") as caught:
        check_parity(artifact.directory)

    assert caught.value.exit_code == 4


def test_file_that_is_no_graph_is_refused_by_name(artifact):
    (artifact.directory / FIRST).write_bytes(b"no graph")
    Artifact.write(artifact.directory, artifact.manifest)

    refused(artifact, f"{FIRST}: is no ONNX file")


SCALED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 2] x, float[2] scale) => (float[batch, 2] y) {
    y = Mul (x, scale)
}
"""


def test_signature_has_names_dtypes_dimensions_and_what_is_optional():
    model = ir.from_onnx_text(SCALED)
    SetDefaults({"scale": np.array([0.5, 0.25], np.float32)})(model)

    inputs, outputs = signature(model)

    assert inputs == (
        TensorSpec("x", "float32", ("batch", 2)),
        TensorSpec("scale", "float32", (2,), optional=True),
    )
    assert outputs == (TensorSpec("y", "float32", ("batch", 2)),)
