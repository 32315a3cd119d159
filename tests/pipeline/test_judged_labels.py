"""Class names, and what a classifier's logits mean, are part of the verdict."""

import json
import shutil
from dataclasses import replace

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.parity.inputs import load_recorded_base
from propulsion_export.pipeline.judged_adapters import checks_of_adapters, judged_adapters
from propulsion_export.pipeline.merge import merge


def failed(directory):
    """The failed checks of the adapters, by adapter."""
    read = Artifact.read(directory)
    adapters = judged_adapters(read, (), 0)
    base = load_recorded_base(read, adapters, None)
    checks = checks_of_adapters(read, adapters, base, 0)
    return {check.adapter: check.detail for check in checks if not check.passed}


def rotated(names):
    return (*names[1:], names[0])


def rewritten(directory, target, *, entry=None, base=None, names=False):
    """A copy with another entry of `one`, of the base model, or other names in config.json."""
    shutil.copytree(directory, target)
    manifest = Artifact.read(directory).manifest
    if names:
        config = json.loads((target / "config.json").read_text())
        config["id2label"] = dict(enumerate(rotated(tuple(config["id2label"].values()))))
        (target / "config.json").write_text(json.dumps(config))
    if entry:
        changed = replace(manifest.adapters["one"], **entry)
        manifest = replace(manifest, adapters=manifest.adapters | {"one": changed})
    if base:
        manifest = replace(manifest, base=replace(manifest.base, **base))
    Artifact.write(target, manifest)
    return target


@pytest.mark.parametrize("mode", ["folded", "switchable"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_right_names_pass(mode, task, exported):
    assert failed(exported("bert", mode, task=task)) == {}


def test_names_of_the_base_model_are_compared(exported, tmp_path):
    right = exported("bert", "switchable", task="text-classification")
    labels = Artifact.read(right).manifest.base.labels
    wrong = rewritten(right, tmp_path / "wrong", base={"labels": rotated(labels)})

    assert list(failed(wrong)) == ["base"]


@pytest.mark.parametrize(("mode", "name"), [("folded", "one"), ("switchable", "base")])
def test_names_in_the_configuration_are_compared(mode, name, exported, tmp_path):
    right = exported("bert", mode, task="token-classification")
    wrong = rewritten(right, tmp_path / "wrong", names=True)

    assert "config.json names the classes" in failed(wrong)[name]


def test_names_of_a_merged_checkpoint_are_compared(make_world, tmp_path):
    merged = merge(make_world("bert", "token-classification").one, tmp_path / "merged")
    wrong = rewritten(merged.directory, tmp_path / "wrong", names=True)

    assert failed(merged.directory) == {}
    assert "config.json names the classes" in failed(wrong)["one"]


def test_what_the_logits_mean_is_compared(exported, tmp_path):
    right = exported("bert", "switchable", task="text-classification")
    wrong = rewritten(
        right, tmp_path / "wrong", entry={"problem_type": "multi_label_classification"}
    )

    assert "multi_label_classification" in failed(wrong)["one"]
