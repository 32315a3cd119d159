import json
import shutil

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.cli import main


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def test_export_goes_the_whole_road(world, tmp_path, capsys):
    code = run(
        *("export", "-a", f"a={world.three}", "-a", f"b={world.five}", "--mode", "switchable"),
        *("-o", tmp_path / "out", "--runtime", "tensorrt-rtx", "--target", "sm_89", "--json"),
    )

    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert told["parity"] == {"onnx": "passed", "engine": "not run"}
    assert Artifact.read(tmp_path / "out" / "onnx").manifest.mode == "switchable"
    assert Artifact.read(tmp_path / "out" / "engine").manifest.engine.targets == ("sm_89",)
    assert (tmp_path / "out" / "parity-onnx" / "parity.html").is_file()


def test_an_engine_that_cannot_be_built_here_is_told_and_is_no_success(world, tmp_path, capsys):
    code = run(
        *("export", "-a", world.three, "-o", tmp_path / "out", "--runtime", "tensorrt", "--json"),
    )

    told = json.loads(capsys.readouterr().out)
    assert code == 3
    assert "tensorrt" in told["engine_missing"]
    assert told["parity"] == {"onnx": "passed"}


def test_an_existing_part_is_told_before_any_work(world, tmp_path, capsys):
    (tmp_path / "out" / "engine").mkdir(parents=True)
    (tmp_path / "out" / "engine" / "mine").write_text("kept")

    assert run("export", "-a", world.three, "-o", tmp_path / "out") == 2
    assert (tmp_path / "out" / "engine" / "mine").read_text() == "kept"
    assert not (tmp_path / "out" / "onnx").exists()


def test_a_part_that_is_an_input_is_told_before_any_work(world, tmp_path, capsys):
    adapter = shutil.copytree(world.three, tmp_path / "out" / "parity-onnx")

    code = run("export", "-a", f"a={adapter}", "-o", tmp_path / "out", "--force")

    assert code == 2
    assert "is an input of this command" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parity-onnx"]
