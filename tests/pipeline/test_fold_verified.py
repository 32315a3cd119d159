"""`onnx --from --verify`: what changed between folding and reading again is found."""

from dataclasses import replace

import onnx
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.cli.app import main
from propulsion_export.errors import VerificationError
from propulsion_export.pipeline import fold_onnx as pipeline
from propulsion_export.pipeline.fold_onnx import fold_onnx


def test_what_was_folded_passes(world, switchable, tmp_path):
    plain = fold_onnx([world.three], tmp_path / "plain", from_artifact=switchable)

    found = fold_onnx([world.three], tmp_path / "out", from_artifact=switchable, verify=True)

    assert found["three"].manifest == plain["three"].manifest


@pytest.mark.slow
def test_an_encoder_decoders_graphs_pass(make_world, exported, tmp_path):
    source = exported("t5", "switchable", task=None)

    fold_onnx([make_world("t5", None).one], tmp_path / "out", from_artifact=source, verify=True)


def test_the_builders_graph_passes(genai_world, genai_artifact, tmp_path):
    fold_onnx(
        [genai_world("llama").one],
        tmp_path / "out",
        from_artifact=genai_artifact("llama"),
        verify=True,
    )


def flipped_weight(graph):
    weight = max(graph.graph.initializer, key=lambda each: len(each.raw_data))
    weight.raw_data = weight.raw_data[:-1] + bytes([weight.raw_data[-1] ^ 1])


def other_node(graph):
    next(node for node in graph.graph.node if node.op_type == "MatMul").input.reverse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flipped_weight, "is not the weight that was folded"),
        (other_node, "its nodes are not those that were folded"),
    ],
)
def test_a_graph_that_was_written_wrongly_is_found(
    change, message, world, switchable, tmp_path, monkeypatch
):
    plain = pipeline.write_graphs

    def wrong(programs, directory):
        plain(programs, directory)
        graph = onnx.load(directory / "model.onnx")
        change(graph)
        onnx.save(graph, directory / "model.onnx")

    monkeypatch.setattr(pipeline, "write_graphs", wrong)
    with pytest.raises(VerificationError, match=message):
        fold_onnx([world.three], tmp_path / "out", from_artifact=switchable, verify=True)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "tokenizer.json"])
def test_a_byte_that_changed_on_the_disk_is_found(name, world, switchable, tmp_path, monkeypatch):
    plain = pipeline.verify_graphs

    def damaged(artifact, recorded):
        file = artifact.directory / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        plain(artifact, recorded)

    monkeypatch.setattr(pipeline, "verify_graphs", damaged)
    with pytest.raises(VerificationError, match=f"{name}: what is on the disk is not what was"):
        fold_onnx(
            [world.three, f"other={world.five}"],
            tmp_path / "out",
            from_artifact=switchable,
            verify=True,
        )

    assert not list(tmp_path.iterdir())


def test_a_graph_of_another_adapter_is_found(world, switchable, tmp_path, monkeypatch):
    other = fold_onnx([world.five], tmp_path / "other", from_artifact=switchable)["five"]
    plain = pipeline.verify_graphs

    def exchanged(artifact, recorded):
        files = {**artifact.manifest.files, "model.onnx": other.manifest.files["model.onnx"]}
        content = (other.directory / "model.onnx").read_bytes()
        (artifact.directory / "model.onnx").write_bytes(content)
        plain(Artifact(artifact.directory, replace(artifact.manifest, files=files)), recorded)

    monkeypatch.setattr(pipeline, "verify_graphs", exchanged)
    with pytest.raises(VerificationError, match="is not the weight that was folded"):
        fold_onnx([world.three], tmp_path / "out", from_artifact=switchable, verify=True)


def test_the_command_takes_it_with_from_alone(world, switchable, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "verify_graphs", lambda *arguments: seen.append(arguments))
    arguments = ["onnx", "-a", str(world.three), "-o", str(tmp_path / "out"), "--verify"]
    for more, code in (([], 2), (["--from", str(switchable), "--no-parity"], 0)):
        with pytest.raises(SystemExit) as exit:
            main([*arguments, *more])
        assert exit.value.code == code

    assert "--verify: does nothing without --from" in capsys.readouterr().err
    assert len(seen) == 1
