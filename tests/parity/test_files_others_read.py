"""What transformers and its pipelines read of an artifact, and our own session does not."""

import json
import shutil

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity


def rewritten(directory, file, change):
    """A changed JSON file, with its digest repaired."""
    manifest = Artifact.read(directory).manifest
    settings = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(settings | change(settings)))
    Artifact.write(directory, manifest)


def reversed_numbers(settings):
    last = len(settings["label2id"]) - 1
    return {"label2id": {name: last - n for name, n in settings["label2id"].items()}}


WRONG = {
    "numbers of labels": ("config.json", reversed_numbers, "labels"),
    "problem type": (
        "config.json",
        lambda _: {"problem_type": "multi_label_classification"},
        "labels",
    ),
    "side of padding": ("tokenizer_config.json", lambda _: {"padding_side": "left"}, "texts"),
    "name of a special token": (
        "tokenizer_config.json",
        lambda _: {"mask_token": "[UNK]"},
        "texts",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_that_others_read_is_compared(name, folded, tmp_path):
    file, change, case = WRONG[name]
    copy = shutil.copytree(folded, tmp_path / "copy")
    rewritten(copy, file, change)

    report = check_parity(copy, effort="quick")

    assert {check.case for check in report.checks if not check.passed} == {case}


@pytest.mark.parametrize(
    ("kind", "task"), [("bert", "text-classification"), ("llama", "text-generation")]
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_merged_checkpoint_loads_in_the_dtype_of_its_weights(
    kind, task, key, make_world, tmp_path
):
    directory = merge(make_world(kind, task).one, tmp_path / "merged").directory
    assert check_parity(directory, effort="quick").passed
    rewritten(directory, "config.json", lambda _: {"dtype": None, key: "float16"})

    report = check_parity(directory, effort="quick")

    (wrong,) = [check for check in report.checks if not check.passed]
    assert (wrong.case, wrong.detail.split(": ")[1]) == (
        "settings",
        "transformers loads the weights in float16, they are float32",
    )


def test_the_problem_type_that_a_switchable_artifact_names_for_others_is_compared(
    export_world, tmp_path
):
    directory = shutil.copytree(export_world("switchable"), tmp_path / "copy")
    rewritten(directory, "config.json", lambda _: {"problem_type": "multi_label_classification"})

    report = check_parity(directory, effort="quick")

    assert {check.case for check in report.checks if not check.passed} == {"labels"}


def test_a_chat_template_from_nowhere_fails(make_world, tmp_path):
    directory = export_onnx([make_world("llama").one], tmp_path / "onnx", mode="folded").directory
    manifest = Artifact.read(directory).manifest
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    Artifact.write(directory, manifest)

    report = check_parity(directory, effort="quick")

    assert {check.case for check in report.checks if not check.passed} == {"settings"}
