"""Several adapters are merged from one reading, all of them or none."""

import json
import os
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.cli.app import main
from propulsion_export.errors import AdapterError, BaseModelError, UsageError, VerificationError
from propulsion_export.merging import verifying, writing
from propulsion_export.pipeline.merge import MergeOptions, merge, merge_adapters

PLAIN = MergeOptions()


@pytest.fixture
def sharded(tmp_path, tiny_model, write_adapter):
    """A Llama in several files, and adapters `low` and `high` of one of its layers each."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    found, fingerprint = {}, fingerprint_of_model(model)
    for seed, (name, layer) in enumerate({"low": 0, "high": 1}.items()):
        random = np.random.default_rng(seed)
        path = f"model.layers.{layer}.mlp.up_proj"
        width = model.get_submodule(path).out_features
        scales = {path: Scale(random.uniform(0.5, 1.5, width))}
        adapter = Adapter(name, scales, base=str(tmp_path / "base"), task="text-generation")
        found[name] = write_adapter(replace(adapter, fingerprint=fingerprint), tmp_path / name)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    return found


def contents(directory):
    return {
        file.name: file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != "propulsion.json"
    }


@pytest.mark.parametrize("kind", ["heads", "llama"])
def test_each_is_what_it_is_alone(kind, sharded, world, tmp_path):
    adapters = list(sharded.values()) if kind == "llama" else [world.three, world.five]

    artifacts = merge_adapters(adapters, tmp_path / "out", PLAIN)

    for given, artifact in zip(adapters, artifacts, strict=True):
        alone = merge(given, tmp_path / "alone", force=True)
        assert contents(artifact.directory) == contents(alone.directory)
        assert artifact.manifest == alone.manifest
        assert artifact == Artifact.read(artifact.directory)
        assert artifact.directory == tmp_path / "out" / given.name
    assert len({str(contents(artifact.directory)) for artifact in artifacts}) == 2


def test_the_command_takes_several(sharded, tmp_path, capsys):
    arguments = [part for n, d in sharded.items() for part in ("-a", f"my-{n}={d}")]

    with pytest.raises(SystemExit) as ended:
        main(["merge", *arguments, "-o", str(tmp_path / "out"), "--verify", "--share", "--json"])

    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["artifacts"] == [str(tmp_path / "out" / f"my-{name}") for name in sharded]


def test_a_single_adapter_in_a_list_is_written_to_the_output_itself(sharded, tmp_path):
    (artifact,) = merge_adapters([sharded["low"]], tmp_path / "out", PLAIN)

    assert artifact.directory == tmp_path / "out"
    assert (tmp_path / "out" / "propulsion.json").is_file()


def test_of_several_of_which_one_is_refused_none_is_written(sharded, tmp_path, write_adapter):
    adapter = Adapter.read(sharded["high"])
    near = {path: Scale(np.nextafter(s.values * 0 + 1, 2)) for path, s in adapter.scales.items()}
    nothing = write_adapter(
        replace(adapter, scales=near, biases={}), tmp_path / "nothing"
    )  # rounded to float32 it is 1

    with pytest.raises(AdapterError, match="adapter nothing: "):
        merge_adapters([sharded["low"], nothing], tmp_path / "out", PLAIN)

    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_error_while_writing_leaves_nothing(sharded, tmp_path, monkeypatch):
    written, pwrite = [], os.pwrite

    def full(*arguments):
        written.append(arguments)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(writing.os, "pwrite", full)

    with pytest.raises(UsageError, match=r"no space left .*; nothing was written"):
        merge_adapters(list(sharded.values()), tmp_path / "out", PLAIN)

    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_two_adapters_of_one_name_are_refused(sharded, tmp_path):
    with pytest.raises(UsageError, match="two adapters are called 'low'"):
        merge_adapters([sharded["low"], f"low={sharded['high']}"], tmp_path / "out", PLAIN)


def test_force_replaces_several_merges_and_nothing_else(sharded, tmp_path):
    both, force = list(sharded.values()), MergeOptions(force=True)
    merge_adapters(both, tmp_path / "out", PLAIN)
    with pytest.raises(UsageError, match="exists and is not empty"):
        merge_adapters(both, tmp_path / "out", PLAIN)

    merge_adapters(both, tmp_path / "out", force)

    assert {place.name for place in (tmp_path / "out").iterdir()} == {"low", "high"}
    with pytest.raises(UsageError, match="holds low, expected nothing but other and high"):
        merge_adapters([f"other={both[0]}", both[1]], tmp_path / "out", force)
    assert (tmp_path / "out" / "low").is_dir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years")
    with pytest.raises(UsageError, match=r"holds thesis\.txt, expected nothing but"):
        merge_adapters(both, tmp_path / "out", force)
    assert (tmp_path / "out" / "thesis.txt").is_file()


# --share


def test_shared_files_are_the_base_models_own(sharded, tmp_path):
    base = tmp_path / "base"
    for file in base.glob("*.safetensors"):
        file.chmod(0o640)

    merge_adapters(list(sharded.values()), tmp_path / "out", MergeOptions(share=True))

    for name in sharded:
        artifact = Artifact.read(tmp_path / "out" / name)
        files = sorted(artifact.directory.glob("*.safetensors"))
        same = [file for file in files if file.samefile(base / file.name)]
        changed = [file for file in files if file not in same]
        assert len(same) == len(files) - 1
        assert load_file(changed[0]).keys() == load_file(base / changed[0].name).keys()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in base.glob("*.safetensors")}
    assert modes == {0o640}


def test_replacing_a_merge_that_shares_leaves_the_base_model_alone(sharded, tmp_path):
    before = contents(tmp_path / "base")
    share = MergeOptions(share=True, force=True)
    merge_adapters([sharded["low"]], tmp_path / "out", share)

    merge_adapters([sharded["high"]], tmp_path / "out", share)

    assert contents(tmp_path / "base") == before
    shutil.rmtree(tmp_path / "out")
    assert contents(tmp_path / "base") == before


# --verify


def test_an_output_that_differs_is_removed(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(verifying, "digest_of", lambda path: "sha256:other")

    with pytest.raises(VerificationError, match="what is on the disk is not what was written"):
        merge(sharded["low"], tmp_path / "out", verify=True)

    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_merge_onto_a_merge_that_holds_one_of_them_is_refused(sharded, tmp_path):
    merge(sharded["low"], tmp_path / "merged")

    with pytest.raises(BaseModelError, match="holds the adapter low already"):
        merge_adapters(
            list(sharded.values()), tmp_path / "out", MergeOptions(model=str(tmp_path / "merged"))
        )
