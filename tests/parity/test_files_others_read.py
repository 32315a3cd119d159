"""What transformers and its pipelines read of an artifact, and our own session does not."""

import json
import shutil

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.pipeline.parity import check_parity


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
    copy = tmp_path / "copy"
    shutil.copytree(folded, copy)
    settings = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(settings | change(settings)))
    Artifact.write(copy, Artifact.read(folded).manifest)

    report = check_parity(copy, effort="quick")

    assert {check.case for check in report.checks if not check.passed} == {case}
