"""An adapter folded into an artifact's graphs is what an ordinary folded export writes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

import propulsion_export.graph.files as files
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.cli.app import main
from propulsion_export.engine import BuildOptions
from propulsion_export.errors import AdapterError, ArtifactError, BaseModelError, UsageError
from propulsion_export.graph.files import read_graph, write_graphs
from propulsion_export.pipeline.fold_onnx import fold_onnx
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.trt import build_engine
from propulsion_export.runners.onnxruntime import onnxruntime_runner


def run(arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code


def graphs(directory):
    return {
        file.name: read_graph(directory, file.name) for file in sorted(directory.glob("*.onnx"))
    }


def constants(node):
    """The constants that a node reads, as bytes."""
    values = [value for value in node.inputs if value is not None and value.is_initializer()]
    return [(value.shape.numpy(), value.const_value.numpy().tobytes()) for value in values]


def assert_same_graphs(found, expected):
    """The same nodes reading the same bytes, whatever values are called."""
    found, expected = graphs(found), graphs(expected)
    assert found.keys() == expected.keys()
    for name, graph in expected.items():
        mine, theirs = list(found[name].graph), list(graph.graph)
        assert [node.op_type for node in mine] == [node.op_type for node in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert constants(one) == constants(other), f"{name}: {one.name}"
        for ends in ("inputs", "outputs"):
            values = [getattr(each.graph, ends) for each in (found[name], graph)]
            mine, theirs = [[(value.name, str(value.shape)) for value in each] for each in values]
            assert mine == theirs


def assert_same_files(found, expected):
    """The same files with the same content, but for the graphs and their digests."""
    names = {path.relative_to(expected).as_posix() for path in expected.rglob("*")}
    assert {path.relative_to(found).as_posix() for path in found.rglob("*")} == names
    for name in names:
        if not name.endswith((".onnx", ".data", "propulsion.json")):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    mine, theirs = (Artifact.read(each).manifest for each in (found, expected))
    assert replace(mine, files={}) == replace(theirs, files={})


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("llama", None),
        pytest.param("t5", None, marks=pytest.mark.slow),
        pytest.param("albert", "text-classification", marks=pytest.mark.slow),
        pytest.param("gpt2", None, marks=pytest.mark.slow),
        pytest.param("mixtral", None, marks=pytest.mark.slow),
        pytest.param("bart", None, marks=pytest.mark.slow),
    ],
)
def test_it_equals_the_folded_export(kind, task, make_world, exported, tmp_path):
    world = make_world(kind, task)

    fold_onnx(
        [world.one], tmp_path / "found", from_artifact=exported(kind, "switchable", task=task)
    )

    assert_same_graphs(tmp_path / "found", exported(kind, "folded", task=task))
    assert_same_files(tmp_path / "found", exported(kind, "folded", task=task))


@pytest.mark.slow
def test_what_the_graph_has_as_a_constant_is_refused(make_world, exported, tmp_path):
    """A tiny DeBERTa's projections of relative positions read constants, and are folded to some."""
    task = "text-classification"
    source = exported("deberta-v2", "switchable", task=task)

    with pytest.raises(BaseModelError, match=r"pos_key_proj: found no weight in the graph"):
        fold_onnx([make_world("deberta-v2", task).one], tmp_path / "found", from_artifact=source)
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_the_builders_graph_equals_its_folded_export(kind, genai_world, genai_artifact, tmp_path):
    fold_onnx([genai_world(kind).one], tmp_path / "found", from_artifact=genai_artifact(kind))

    assert_same_graphs(tmp_path / "found", genai_artifact(kind, "folded"))
    assert_same_files(tmp_path / "found", genai_artifact(kind, "folded"))


def test_the_builders_graph_without_slots_can_be_the_source(genai_world, genai_artifact, tmp_path):
    world = genai_world("llama")
    export_onnx([], tmp_path / "base", model=str(world.base), exporter="genai")

    fold_onnx([world.one], tmp_path / "found", from_artifact=tmp_path / "base")

    assert_same_graphs(tmp_path / "found", genai_artifact("llama", "folded"))


def test_a_head_has_the_adapters_labels_and_biases_are_folded(world, switchable, folded, tmp_path):
    """The source has room for five labels, the adapter three."""
    fold_onnx([world.three], tmp_path / "found", from_artifact=switchable)

    assert_same_graphs(tmp_path / "found", folded)
    assert_same_files(tmp_path / "found", folded)


def test_another_adapters_fold_is_another(world, switchable, folded, tmp_path):
    fold_onnx([f"three={world.five}"], tmp_path / "found", from_artifact=switchable)

    with pytest.raises(AssertionError):
        assert_same_graphs(tmp_path / "found", folded)


def test_several_adapters_get_a_directory_each_and_pass(world, switchable, tmp_path, capsys):
    arguments = ["-a", str(world.three), "-a", f"other={world.five}", "-o", str(tmp_path / "out")]

    assert run(["onnx", "--from", str(switchable), *arguments, "--json"]) == 0

    told = json.loads(capsys.readouterr().out)["adapters"]
    assert {name: each["parity"] for name, each in told.items()} == {
        "three": "passed",
        "other": "passed",
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["other", "three"]


@pytest.fixture
def beside(switchable, tmp_path, monkeypatch):
    """The switchable artifact with its weights in a file beside the graph."""
    monkeypatch.setattr(files, "_INLINE_BYTES", 512)
    directory = tmp_path / "beside"
    shutil.copytree(switchable, directory)
    write_graphs({"model.onnx": read_graph(directory)}, directory)
    artifact = Artifact.write(directory, Artifact.read(switchable).manifest)
    return artifact.directory


@pytest.fixture
def attention(world, tmp_path, write_adapter):
    """The adapter `three` with scales for its attention only."""
    read = Adapter.read(world.three)
    scales = {path: scale for path, scale in read.scales.items() if ".self." in path}
    return write_adapter(replace(read, scales=scales, biases={}), tmp_path / "attention")


def test_shared_weights_are_linked_and_only_the_changed_ones_written(beside, attention, tmp_path):
    fold_onnx([attention], tmp_path / "whole", from_artifact=beside)
    artifact = fold_onnx([attention], tmp_path / "found", from_artifact=beside, share=True)

    data, own = (tmp_path / "found" / f"model.onnx.{name}" for name in ("data", "own.data"))
    assert data.samefile(beside / "model.onnx.data")
    assert own.stat().st_size < data.stat().st_size / 2
    assert Artifact.read(tmp_path / "found") == artifact["attention"]
    assert_same_graphs(tmp_path / "found", tmp_path / "whole")
    assert check_parity(tmp_path / "found").passed


def test_a_linked_file_keeps_its_permissions(beside, attention, tmp_path):
    (beside / "model.onnx.data").chmod(0o400)

    fold_onnx([attention], tmp_path / "found", from_artifact=beside, share=True)

    assert (beside / "model.onnx.data").stat().st_mode & 0o777 == 0o400


def test_a_file_that_cannot_be_linked_is_told_and_nothing_is_left(
    beside, attention, tmp_path, monkeypatch
):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    with pytest.raises(UsageError, match=r"--share: .*model.onnx.data cannot be linked"):
        fold_onnx([attention], tmp_path / "found", from_artifact=beside, share=True)

    assert not (tmp_path / "found").exists()


@pytest.fixture(scope="module")
def base_artifact(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "onnx"
    export_onnx([], directory, model=str(world.base), task="feature-extraction")
    return directory


def test_the_base_models_own_graph_can_be_the_source(world, base_artifact, tmp_path):
    adapter = without_head(world.three, tmp_path / "adapter")
    export_onnx([adapter], tmp_path / "expected", task="feature-extraction")

    fold_onnx([adapter], tmp_path / "found", from_artifact=base_artifact)

    assert_same_graphs(tmp_path / "found", tmp_path / "expected")
    assert check_parity(tmp_path / "found").passed


def without_head(directory, destination):
    read = Adapter.read(directory)
    prefix = "bert."
    destination.mkdir()
    replace(
        read,
        scales={path.removeprefix(prefix): scale for path, scale in read.scales.items()},
        biases={path.removeprefix(prefix): bias for path, bias in read.biases.items()},
        modules={},
        labels=None,
        task=None,
    ).write(destination)
    return destination


def test_a_module_that_the_base_graph_does_not_name_is_refused(world, base_artifact, tmp_path):
    adapter = without_head(world.three, tmp_path / "adapter")
    read = Adapter.read(adapter)
    (tmp_path / "other").mkdir()
    scales = {"encoder.layer.7.output.dense": Scale(np.full(32, 2.0))}
    replace(read, scales=scales, biases={}).write(tmp_path / "other")

    with pytest.raises(AdapterError, match=r"encoder\.layer\.7\.output\.dense: its weight is not"):
        fold_onnx([tmp_path / "other"], tmp_path / "found", from_artifact=base_artifact)


def test_a_module_without_a_slot_is_refused(world, switchable, tmp_path):
    read = Adapter.read(world.three)
    scales = {"bert.embeddings.LayerNorm": Scale(np.full(32, 2.0)), **read.scales}
    (tmp_path / "more").mkdir()
    replace(read, scales=scales).write(tmp_path / "more")

    with pytest.raises(AdapterError, match=r"more: bert\.embeddings\.LayerNorm has shape \[32\]"):
        fold_onnx([tmp_path / "more"], tmp_path / "found", from_artifact=switchable)
    assert not (tmp_path / "found").exists()


def test_an_adapter_of_another_base_model_is_refused(world, switchable, tmp_path):
    read = Adapter.read(world.three)
    assert read.fingerprint is not None
    entries = {
        name: tuple(value + 1 for value in values)
        for name, values in read.fingerprint.entries.items()
    }
    (tmp_path / "stranger").mkdir()
    other = replace(read.fingerprint, entries=entries)
    replace(read, fingerprint=other).write(tmp_path / "stranger")

    with pytest.raises(BaseModelError, match="is not the base model of adapter stranger"):
        fold_onnx([tmp_path / "stranger"], tmp_path / "found", from_artifact=switchable)


def test_what_no_adapter_can_be_folded_into_is_refused(world, banked, folded, tmp_path):
    for source, found in ((banked, "is a bank"), (folded, "has three folded in")):
        with pytest.raises(ArtifactError, match=f"{found}, expected an ONNX artifact"):
            fold_onnx([world.three], tmp_path / "found", from_artifact=source)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["-m", "elsewhere"], ["--model"]),
        (["--task", "auto", "--opset", "20"], ["--task", "--opset"]),
        (["--mode", "bank"], ["--mode bank"]),
        (["--exporter", "genai", "--quantize", "int4"], ["--exporter", "--quantize"]),
        (["--placement", "all"], ["--placement"]),
    ],
)
def test_options_that_the_artifact_settles_are_refused(
    options, named, world, switchable, tmp_path, capsys
):
    arguments = ["-a", str(world.three), "-o", str(tmp_path / "out"), *options]

    assert run(["onnx", "--from", str(switchable), *arguments]) == 2

    told = capsys.readouterr().err
    assert all(f"{name}: found with --from" in told for name in named)


@pytest.mark.parametrize("option", [["--share"], ["--for", "tensorrt"]])
def test_what_needs_from_is_refused_without_it(option, world, tmp_path, capsys):
    assert run(["onnx", "-a", str(world.three), "-o", str(tmp_path / "out"), *option]) == 2
    assert f"{option[0]}: does nothing without --from" in capsys.readouterr().err


@pytest.fixture(scope="module")
def quantised(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantised") / "switchable"
    quantisation = {"quantize": "int8", "quantization_form": "qdq"}
    adapters = [world.three, world.five]
    export_onnx(adapters, directory, mode="switchable", exporter="transformers", **quantisation)
    return directory


@pytest.fixture
def signed(world, tmp_path):
    """The adapter `three` with negative scales and zeros."""
    read, scales = Adapter.read(world.three), {}
    for path, scale in read.scales.items():
        values = scale.values.copy()
        values[1::4] *= -1
        values[3] = 0
        scales[path] = Scale(values)
    (tmp_path / "signed").mkdir()
    replace(read, scales=scales).write(tmp_path / "signed")
    return tmp_path / "signed"


def test_a_quantised_artifact_equals_the_quantised_folded_export(quantised, signed, tmp_path):
    export_onnx(
        [signed],
        tmp_path / "expected",
        exporter="transformers",
        quantize="int8",
        quantization_form="qdq",
    )

    fold_onnx([signed], tmp_path / "found", from_artifact=quantised)

    assert_same_graphs(tmp_path / "found", tmp_path / "expected")
    assert check_parity(tmp_path / "found").passed


def test_for_tensorrt_no_multiply_by_a_sign_is_left(quantised, signed, tmp_path):
    fold_onnx([signed], tmp_path / "any", from_artifact=quantised)
    fold_onnx([signed], tmp_path / "engine", from_artifact=quantised, for_runtime="tensorrt")

    multiplies = {
        name: sum(node.op_type == "Mul" for node in graphs(tmp_path / name)["model.onnx"].graph)
        for name in ("any", "engine")
    }
    assert multiplies["any"] - multiplies["engine"] == 13  # one for each quantised layer
    assert all((scales > 0).all() for scales in quantisation_scales(tmp_path / "engine"))
    assert check_parity(tmp_path / "engine").passed
    inputs = {
        name: np.ones((1, 4), np.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    one, other = (
        onnxruntime_runner(tmp_path / name / "model.onnx")(inputs)["logits"]
        for name in ("any", "engine")
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_integers_with_other_signs_do_not_pass(quantised, signed, tmp_path):
    """The verdict knows signs of the adapter's scales only."""
    directory = tmp_path / "engine"
    artifact = fold_onnx([signed], directory, from_artifact=quantised, for_runtime="tensorrt")
    model = read_graph(directory)
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    integers = node.inputs[0].const_value.numpy().copy()
    integers[:, 0] *= -1  # a channel whose scale is above zero
    node.inputs[0].const_value = ir.tensor(integers, name=node.inputs[0].name)
    write_graphs({"model.onnx": model}, directory)
    Artifact.write(directory, artifact["signed"].manifest)

    report = check_parity(directory)

    assert not report.passed
    assert any("integers of no layer" in check.detail for check in report.checks)


def quantisation_scales(directory):
    for node in graphs(directory)["model.onnx"].graph:
        if node.op_type == "DequantizeLinear":
            yield node.inputs[1].const_value.numpy()


def test_an_engine_is_built_of_signed_integers_and_shared_weights(
    quantised, signed, tmp_path, monkeypatch
):
    pytest.importorskip("tensorrt_rtx", reason="an engine is built")
    monkeypatch.setattr(files, "_INLINE_BYTES", 512)
    source = tmp_path / "source"
    shutil.copytree(quantised, source)
    write_graphs({"model.onnx": read_graph(source)}, source)
    Artifact.write(source, Artifact.read(quantised).manifest)
    folded = tmp_path / "folded"
    fold_onnx([signed], folded, from_artifact=source, share=True, for_runtime="tensorrt")

    options = BuildOptions(runtime="tensorrt-rtx", targets=("sm_89",))
    artifact = build_engine(folded, tmp_path / "engine", options)

    assert artifact.manifest.mode == "folded"


def test_for_tensorrt_the_form_of_onnx_runtime_is_refused(genai_world, genai_artifact, tmp_path):
    with pytest.raises(ArtifactError, match=r"--for tensorrt: .* of onnxruntime-genai's builder"):
        fold_onnx(
            [genai_world("llama").one],
            tmp_path / "found",
            from_artifact=genai_artifact("llama"),
            for_runtime="tensorrt",
        )
