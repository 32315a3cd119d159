"""A link that is repointed while an engine is built or read, or a package is written.

Each command reads the directory that the link led to when it began, and names the path that was
given.
"""

import json
import shutil
from dataclasses import replace

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.cli import main
from propulsion_export.engine import BuildOptions, builder
from propulsion_export.errors import ArtifactError, UnavailableError, UsageError
from propulsion_export.packaging import genai, triton
from propulsion_export.pipeline.package import package
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.trt import build_engine
from propulsion_export.runners.opening import open_runner

RTX = BuildOptions(runtime="tensorrt-rtx", targets=("sm_89",))


class Link:
    """`current`, a link to `first`; it leads to an empty directory once it is repointed."""

    def __init__(self, first, root):
        self.path, self.first, self.empty = root / "current", first, root / "nothing"
        self.empty.mkdir()
        self.path.symlink_to(first)

    def repoint(self):
        aside = self.path.with_name("next")
        aside.symlink_to(self.empty)
        aside.replace(self.path)


@pytest.fixture
def link(tmp_path):
    """`link(directory)`: a link to it."""
    return lambda directory: Link(directory, tmp_path)


@pytest.fixture
def repointed(link, monkeypatch):
    """`repointed(directory)`: a link to it that is repointed once the manifest has been read."""

    def make(directory):
        made, read = link(directory), Artifact.read.__func__

        def repointing(kind, place, **options):
            artifact = read(kind, place, **options)
            made.repoint()
            return artifact

        monkeypatch.setattr(Artifact, "read", classmethod(repointing))
        return made.path

    return make


@pytest.fixture(scope="module")
def engine(switchable, tmp_path_factory):
    """An engine of the switchable export."""
    output = tmp_path_factory.mktemp("engine") / "engine"
    build_engine(switchable, output, RTX)
    return output


def contents(directory, but=()):
    """Every file of a directory, by path."""
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in (*but, MANIFEST_FILE)
    }


# Engines


def test_an_engine_is_built_of_the_directory_that_the_link_led_to(
    engine, switchable, repointed, tmp_path
):
    built = build_engine(repointed(switchable), tmp_path / "out", RTX)

    right = json.loads((engine / MANIFEST_FILE).read_text())
    found = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert found["inputs"] == right["inputs"]
    assert found["adapters"] == right["adapters"]
    assert found["engine"]["onnx_digest"] == right["engine"]["onnx_digest"]
    assert built.path.stat().st_size > 1000
    assert contents(tmp_path / "out", ["model.engine"]) == contents(engine, ["model.engine"])


def test_a_link_that_is_repointed_while_the_engine_is_built_changes_nothing(
    engine, banked, link, tmp_path, monkeypatch
):
    of, build = link(banked), builder.build
    rows = sorted(Bank.open(banked).rows())

    def repointing(*arguments):
        of.repoint()
        return build(*arguments)

    monkeypatch.setattr(builder, "build", repointing)
    build_engine(of.path, tmp_path / "out", RTX)

    assert sorted(Bank.open(tmp_path / "out").rows()) == rows
    kept = contents(banked, ["model.onnx", "model.onnx.data"])
    assert (
        contents(tmp_path / "out", ["model.engine"]).items()
        >= {name: content for name, content in kept.items() if "/" not in name}.items()
    )


def test_an_engine_is_read_from_the_directory_that_the_link_led_to(engine, repointed, capsys):
    right = {name: Artifact.read(engine).feeds(name) for name in ("three", "five", None)}
    path = repointed(engine)

    read = Artifact.read(path)

    assert all(
        (read.feeds(n)[k] == v).all() for n, feeds in right.items() for k, v in feeds.items()
    )
    assert read.path == engine / "model.engine"


def test_an_engine_is_inspected_in_the_directory_that_the_link_led_to(engine, repointed, capsys):
    def inspected(path):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(path), "--json"])
        assert ended.value.code in (0, None)
        return json.loads(capsys.readouterr().out)

    right = inspected(engine)

    assert inspected(repointed(engine)) == right


@pytest.mark.parametrize("command", ["parity", "open"])
def test_an_engine_that_cannot_run_here_is_named_by_the_path_that_was_given(
    command, engine, link, no_gpu
):
    path = link(engine).path

    if command == "parity":
        report = check_parity(path, effort="quick")
        told = " ".join(each.reason for each in report.not_run)
    else:
        with pytest.raises(UnavailableError) as caught:
            open_runner(path)
        told = str(caught.value)

    assert f"{path / 'model.engine'}: an engine runs on a GPU only" in told


@pytest.fixture
def no_gpu(monkeypatch):
    from propulsion_export.runners import tensorrt

    monkeypatch.setattr(tensorrt, "cuda_devices", lambda: ())
    monkeypatch.setattr(tensorrt, "cuda_reason", lambda: "there is none")


# Packages


LAYOUTS = {"triton": ("banked", triton), "genai": ("llama", genai)}


@pytest.fixture
def packaged(banked, exported):
    """`packaged(layout)`: the artifact that is packaged."""
    return lambda layout: banked if layout == "triton" else exported("llama", "bank")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_package_is_of_the_directory_that_the_link_led_to(layout, packaged, repointed, tmp_path):
    source = packaged(layout)
    package(source, tmp_path / "right", layout=layout, model_name=name_for(layout))

    made = package(repointed(source), tmp_path / "out", layout=layout, model_name=name_for(layout))

    assert contents(tmp_path / "out") == contents(tmp_path / "right")
    assert len(made.adapters) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_that_is_repointed_while_a_package_is_written_changes_nothing(
    layout, packaged, link, tmp_path, monkeypatch
):
    source, module = packaged(layout), LAYOUTS[layout][1]
    package(source, tmp_path / "right", layout=layout, model_name=name_for(layout))
    of, copy = link(source), module.copy_artifact_files

    def repointing(*arguments):
        of.repoint()
        copy(*arguments)

    monkeypatch.setattr(module, "copy_artifact_files", repointing)
    package(of.path, tmp_path / "out", layout=layout, model_name=name_for(layout))

    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def name_for(layout):
    return "topics" if layout == "triton" else None


# Messages


def damaged(source, directory):
    """A copy without a file of its manifest."""
    shutil.copytree(source, directory)
    (directory / "config.json").unlink()
    return directory


def commands(tmp_path):
    """What reads an artifact's directory, by name."""
    return {
        "trt": lambda path: build_engine(path, tmp_path / "out", RTX),
        "triton": lambda path: package(path, tmp_path / "out", layout="triton", model_name="a"),
        "genai": lambda path: package(path, tmp_path / "out", layout="genai"),
    }


@pytest.mark.parametrize("command", ["trt", "triton", "genai"])
def test_a_damaged_artifact_is_named_by_the_path_that_was_given(command, banked, link, tmp_path):
    path = link(damaged(banked, tmp_path / "release-1")).path

    with pytest.raises(ArtifactError, match=r"current/config\.json: is missing"):
        commands(tmp_path)[command](path)


@pytest.mark.parametrize("command", ["trt", "triton", "genai"])
def test_a_manifest_that_contradicts_the_graph_is_named_so_too(
    command, banked, exported, link, tmp_path
):
    source = exported("llama", "bank") if command == "genai" else banked
    shutil.copytree(source, tmp_path / "release-1")
    read = Artifact.read(tmp_path / "release-1")
    Artifact.write(read.directory, without_an_output(read.manifest))
    path = link(tmp_path / "release-1").path

    with pytest.raises(ArtifactError, match=r"current: the graph has the output"):
        commands(tmp_path)[command](path)


def without_an_output(manifest):
    return replace(manifest, outputs=tuple(replace(each, name="x") for each in manifest.outputs))


@pytest.mark.parametrize(
    ("command", "kind"), [("triton", "switchable"), ("genai", "banked"), ("trt", "engine")]
)
def test_an_artifact_that_does_not_fit_is_named_so_too(command, kind, request, link, tmp_path):
    path = link(request.getfixturevalue(kind)).path

    with pytest.raises((UsageError, ArtifactError), match=f"^{path}: is "):
        commands(tmp_path)[command](path)
