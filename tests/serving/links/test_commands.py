"""A command reads the directory that a link led to when it began."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO

import pytest
from releases import TEXT

from propulsion_export.adapters import adapter as adapter_module
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError

# Artifacts


def run(path, out, world):
    from propulsion_export.pipeline.run import predict

    return predict(path, text=[TEXT], adapter=["three"])


def package_(path, out, world):
    from propulsion_export.pipeline.package import package

    return sorted(package(path, out, layout="onnx-adapter").adapters), digests(out)


def fold(path, out, world):
    from propulsion_export.pipeline.fold_onnx import fold_onnx

    fold_onnx([world.three], out, from_artifact=path)
    return digests(out)


def parity(path, out, world):
    from propulsion_export.pipeline.parity import check_parity

    return check_parity(path, effort="quick").passed


def inspect(path, out, world):
    return described(["inspect", path])


def list_(path, out, world):
    return described(["adapter", "list", path])


def described(arguments):
    from propulsion_export.cli import main

    with redirect_stdout(StringIO()) as shown, pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    assert ended.value.code in (0, None)
    return json.loads(shown.getvalue())


def digests(directory):
    """The digests of the files but for ONNX Runtime's own, whose bytes have no fixed order."""
    files = Artifact.read(directory).manifest.files
    return {name: files[name] for name in files if not name.endswith(".onnx_adapter")}


@pytest.mark.parametrize("command", [run, package_, fold, parity, inspect, list_])
def test_a_command_reads_the_directory_that_the_link_led_to_when_it_began(
    command, releases, world, tmp_path, monkeypatch
):
    of = releases("switchable")
    right = command(of.first, tmp_path / "right", world)
    read = Artifact.read.__func__

    def repointing(kind, directory, **options):
        artifact = read(kind, directory, **options)
        of.point(of.empty)
        return artifact

    monkeypatch.setattr(Artifact, "read", classmethod(repointing))

    assert command(of.link, tmp_path / "out", world) == right


def test_a_bank_is_listed_from_the_directory_that_the_link_led_to(releases, monkeypatch):
    of = releases("banked")
    read = Artifact.read(of.link)

    of.point(of.empty)

    assert sorted(read.list_adapters()) == ["five", "three"]
    assert len(read.open_bank()) == 2


def test_messages_name_the_path_that_the_user_gave(releases, world, monkeypatch, tmp_path):
    of = releases("switchable")
    with pytest.raises(UsageError, match="current: has an adapter 'three' already"):
        add_adapter(of.link, f"three={world.five}")
    with pytest.raises(UnknownAdapterError, match="current: has no adapter 'nine'"):
        Artifact.read(of.link).feeds("nine")
    (of.first / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"current/config\.json: is missing"):
        Artifact.read(of.link)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"^switchable/release-1/config\.json: is missing"):
        Artifact.read("switchable/release-1")


# Adapters


def test_an_adapter_is_read_from_the_directory_that_its_link_led_to(
    world, tmp_path, monkeypatch, switchable
):
    """Its tensors, and all that lies beside them: a tokenizer, a chat template, a pipeline."""
    link = tmp_path / "latest"
    link.symlink_to(world.three)
    directory = shutil.copytree(switchable, tmp_path / "artifact")
    read = adapter_module.read_peft_directory

    def repointing(place):
        found = read(place)
        link.unlink()
        link.symlink_to(tmp_path)
        return found

    monkeypatch.setattr(adapter_module, "read_peft_directory", repointing)
    added = add_adapter(directory, link)

    assert added.manifest.adapters["latest"].source == str(world.three)
    assert added.manifest.adapters["latest"].digest == Adapter.read(world.three).digest


def test_merging_reads_an_adapter_from_the_directory_that_its_link_led_to(
    world, tmp_path, monkeypatch
):
    from propulsion_export.pipeline.merge import merge

    link = tmp_path / "latest"
    link.symlink_to(world.three)
    right = merge(world.three, tmp_path / "right").manifest
    read = adapter_module.read_peft_directory

    def repointing(place):
        link.unlink()
        link.symlink_to(tmp_path)
        return read(place)

    monkeypatch.setattr(adapter_module, "read_peft_directory", repointing)
    found = merge(link, tmp_path / "out").manifest

    assert found.files == right.files
    assert found.adapters["latest"].source == str(world.three)
