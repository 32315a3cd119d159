import pytest

from propulsion_export.artifact import Artifact
from propulsion_export.cli import main
from propulsion_export.engine import BuildOptions
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.pipeline.building import build
from propulsion_export.pipeline.exporting import export_onnx
from propulsion_export.pipeline.merging import merge

TARGETS = ("sm_86", "sm_89", "sm_120")
RTX = BuildOptions(runtime="tensorrt-rtx", targets=TARGETS)
PACKED = {"propulsion_scales", "propulsion_biases", "propulsion_modules"}


@pytest.fixture(scope="module")
def exports(world, folded, switchable):
    made = {("folded", "float32"): folded, ("switchable", "float32"): switchable}
    for mode in ("folded", "switchable"):
        made[mode, "float16"] = world.root / f"{mode}-float16"
        export_onnx([world.three], made[mode, "float16"], mode=mode, dtype="float16")
    return made


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_an_engine_builds_for_every_target(mode, dtype, exports, tmp_path):
    artifact = build(exports[mode, dtype], tmp_path / "engine", RTX)

    assert artifact.path.stat().st_size > 1000
    assert artifact.manifest.engine.targets == TARGETS
    read = {spec.name: spec for spec in artifact.manifest.inputs}
    assert PACKED & read.keys() == (PACKED if mode == "switchable" else set())
    assert not any(spec.optional for spec in artifact.manifest.inputs)
    if mode == "switchable":
        assert read["propulsion_scales"].dtype == dtype


def test_an_engine_artifact_has_the_feeds_of_every_adapter_and_of_none(exports, tmp_path):
    artifact = build(exports["switchable", "float32"], tmp_path / "engine", RTX)

    for name in ("three", "five", None):
        assert artifact.feeds(name).keys() == PACKED
    assert (artifact.feeds(None)["propulsion_scales"] == 1).all()


def test_parity_of_an_engine_is_not_run_without_a_gpu(exports, tmp_path, capsys):
    build(exports["folded", "float32"], tmp_path / "engine", RTX)

    with pytest.raises(SystemExit) as exit:
        main(["parity", str(tmp_path / "engine"), "--report", str(tmp_path / "report")])

    assert exit.value.code == 3
    assert "a GPU only" in capsys.readouterr().out
    assert "NOT RUN" in (tmp_path / "report" / "parity.html").read_text()


def test_tensorrt_without_a_gpu_is_exit_3_with_the_reason(exports, tmp_path, capsys):
    source = str(exports["folded", "float32"])

    with pytest.raises(SystemExit) as exit:
        main(["trt", source, "-o", str(tmp_path / "engine"), "--runtime", "tensorrt"])

    assert exit.value.code == 3
    assert "tensorrt" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_only_an_onnx_export_becomes_an_engine(world, tmp_path):
    merge(world.three, tmp_path / "merged")

    with pytest.raises(ArtifactError, match="is a merged artifact, expected an ONNX export"):
        build(tmp_path / "merged", tmp_path / "engine", RTX)


def test_the_engine_knows_the_graph_it_was_built_from(exports, tmp_path):
    from propulsion_export.engine import onnx_digest

    source = exports["folded", "float32"]
    artifact = build(source, tmp_path / "engine", RTX)

    assert artifact.manifest.engine.onnx_digest == onnx_digest(Artifact.read(source))


def test_an_engine_never_replaces_the_export_it_is_built_from(exports):
    source = exports["folded", "float32"]
    before = (source / "propulsion.json").read_bytes()

    with pytest.raises(UsageError, match="an input of this command"):
        build(source, source, RTX, force=True)

    assert (source / "propulsion.json").read_bytes() == before
