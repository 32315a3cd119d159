"""Several modes of one export: one trace, a complete artifact for each, all of them or none."""

import json

import numpy as np
import onnx_ir as ir
import pytest

import propulsion_export.graph.task_graphs
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.cli.app import main
from propulsion_export.errors import UsageError
from propulsion_export.pipeline.onnx import export_modes, export_onnx
from propulsion_export.pipeline.onnx_options import OnnxOptions
from propulsion_export.pipeline.parity import check_parity

TRACED = OnnxOptions(exporter="transformers")
MODES = ("folded", "switchable", "bank")


@pytest.fixture(scope="module")
def decoder(make_world):
    return make_world("llama", "text-generation")


@pytest.fixture(scope="module")
def several(decoder, tmp_path_factory):
    """All modes of a decoder with one adapter, and how often a model was traced."""
    traced, real = [], propulsion_export.graph.task_graphs.trace_decoder

    def counted(model, *arguments, **options):
        traced.append(type(model).__name__)
        return real(model, *arguments, **options)

    output = tmp_path_factory.mktemp("several") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propulsion_export.graph.task_graphs, "trace_decoder", counted)
        artifacts = export_modes([decoder.one], output, MODES, TRACED)
    return output, artifacts, traced


def operators(directory):
    return sorted(node.op_type for node in ir.load(directory / "model.onnx").graph)


def test_one_trace_serves_all_modes(several):
    output, artifacts, traced = several

    assert traced == ["LlamaForCausalLM"]
    assert {mode: artifact.directory for mode, artifact in artifacts.items()} == {
        mode: output / mode for mode in MODES
    }
    assert sorted(path.name for path in output.iterdir()) == sorted(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_each_is_a_complete_artifact_that_passes(mode, several):
    output, artifacts, _ = several

    assert Artifact.read(output / mode).manifest == artifacts[mode].manifest
    report = check_parity(output / mode)
    assert report.passed, [check.detail for check in report.checks if not check.passed]


def weights(directory):
    initializers = ir.load(directory / "model.onnx").graph.initializers.values()
    return sorted(value.const_value.numpy().tobytes() for value in initializers)


def test_folded_beside_others_has_the_nodes_and_weights_of_folded_alone(several, decoder, tmp_path):
    output, _, _ = several
    export_onnx([decoder.one], tmp_path / "one", exporter="transformers")
    export_onnx([decoder.two], tmp_path / "two", exporter="transformers")

    assert operators(output / "folded") == operators(tmp_path / "one")
    assert weights(output / "folded") == weights(tmp_path / "one")
    assert weights(output / "folded") != weights(tmp_path / "two")


@pytest.mark.slow
def test_modes_that_need_traces_of_their_own_get_them(world, tmp_path):
    """Rows of a bank do not share a head, which one trace cannot express."""
    export_modes([world.three], tmp_path / "out", MODES)

    for mode in MODES:
        assert check_parity(tmp_path / "out" / mode).passed


def test_a_failure_leaves_none_of_them(several, decoder, tmp_path, monkeypatch):
    import propulsion_export.pipeline.onnx as pipeline

    real = pipeline.write_artifact

    def full(exported, prepared, produced, directory):
        if produced.graphs.mode == "bank":
            raise UsageError("the disk is full")
        return real(exported, prepared, produced, directory)

    monkeypatch.setattr(pipeline, "write_artifact", full)
    with pytest.raises(UsageError, match="full"):
        export_modes([decoder.one], tmp_path / "out", MODES)

    assert not any(tmp_path.glob("out/*"))
    assert not any(tmp_path.glob("out/.*"))


def test_an_artifact_is_no_place_for_several(several, decoder):
    output, _, _ = several

    with pytest.raises(UsageError, match="is an artifact, expected a directory for bank and fo"):
        export_modes([decoder.one], output / "bank", ["bank", "folded"])


def test_folded_among_the_modes_takes_one_adapter(decoder, tmp_path):
    with pytest.raises(UsageError, match="2 adapters are given, expected one to fold"):
        export_modes([decoder.one, decoder.two], tmp_path / "out", ["bank", "folded"])
    with pytest.raises(UsageError, match="no mode is given"):
        export_modes([decoder.one], tmp_path / "out", [])


def test_the_command_prints_each_and_where_the_time_went(decoder, tmp_path, capfd):
    arguments = [
        "onnx",
        "-a",
        str(decoder.one),
        "-o",
        str(tmp_path / "out"),
        "--no-parity",
        "--exporter",
        "transformers",
    ]

    with pytest.raises(SystemExit) as done:
        main([*arguments, "--mode", "folded", "--mode", "bank", "--json", "-v"])

    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert done.value.code == 0
    assert {mode: each["mode"] for mode, each in found["modes"].items()} == {
        "folded": "folded",
        "bank": "bank",
    }
    stages = [line.rpartition("  ")[0] for line in printed.err.splitlines() if " CPU-s" in line]
    for name in ("load", "trace LlamaForCausalLM", "finish folded", "optimise", "write"):
        assert any(line.startswith(name) for line in stages), stages
    numbers = np.array(
        [line.split()[-4::2] for line in printed.err.splitlines() if " CPU-s" in line], float
    )
    assert (numbers >= 0).all()
    assert (numbers.max(axis=0) > 0.5).all()


@pytest.mark.slow
def test_graphs_of_the_builder_in_several_modes_pass(tmp_path):
    """A graph of onnxruntime-genai's builder is built for each mode."""
    pytest.importorskip("onnxruntime_genai")
    from genai_models import make
    from tiny_models import save_tokenizer

    model = make("llama", vocab_size=100, bos_token_id=2, eos_token_id=3)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", generative=True)
    options = OnnxOptions(model=str(tmp_path / "base"), exporter="genai")

    artifacts = export_modes([], tmp_path / "out", MODES, options)

    assert {artifact.manifest.exporter for artifact in artifacts.values()} == {"genai"}
    for mode in MODES:
        assert check_parity(tmp_path / "out" / mode).passed
