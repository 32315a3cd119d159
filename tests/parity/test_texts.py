"""Mistakes in the files that read texts, name classes and say how to generate."""

import json
import shutil
import sqlite3
from dataclasses import replace

import pytest
from sealed_registry import seal_again

from chat_models import CHATML
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity

MODES = ("folded", "switchable", "bank")
TOKENIZER = "tokenizer.json"


@pytest.fixture
def copied(tmp_path):
    """`copied(directory)`: a copy that may be changed; `signed` makes its digests right again."""

    def copy(directory):
        return shutil.copytree(directory, tmp_path / "copy")

    return copy


def signed(directory, **changes):
    Artifact.write(directory, replace(Artifact.read(directory).manifest, **changes))
    return directory


def changed(directory, name, change):
    """A JSON file of the copy, changed in place."""
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))
    Artifact.write(directory, _unchecked(directory))
    return directory


def _unchecked(directory):
    from propulsion_export.artifacts.file_names import MANIFEST_FILE
    from propulsion_export.artifacts.manifest import read_manifest

    return read_manifest(directory / MANIFEST_FILE)


def failed(directory, **options):
    report = check_parity(directory, effort="quick", **options)
    return {check.case: check.detail for check in report.checks if not check.passed}


def told(directory, what):
    report = check_parity(directory, effort="quick")
    return next(one for one in report.coverage if one.what == what)


def words_exchanged(content):
    words = content["model"]["vocab"]
    words["ba"], words["ci"] = words["ci"], words["ba"]


def case_kept(content):
    content["normalizer"] = None


def special_lost(content):
    content["post_processor"] = None


def special_exchanged(content):
    for token in content["post_processor"]["special_tokens"].values():
        token["ids"] = [{2: 3, 3: 2}.get(each, each) for each in token["ids"]]


def word_lost(content):
    words = content["model"]["vocab"]
    words["lost"] = words.pop("de")


def accents_stripped(content):
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}],
    }


MISTAKES = {
    "words exchanged": (words_exchanged, "'ba'"),
    "case kept": (case_kept, "texts have other tokens"),
    "special tokens lost": (special_lost, "texts have other tokens"),
    "special tokens exchanged": (special_exchanged, "texts have other tokens"),
    "a word lost": (word_lost, "'de'"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MISTAKES)
def test_another_tokenizer_fails(name, mode, exported, copied):
    change, message = MISTAKES[name]
    directory = changed(
        copied(exported("bert", mode, task="text-classification")), TOKENIZER, change
    )

    found = failed(directory)

    assert found.keys() == {"texts"}
    assert message in found["texts"]


@pytest.mark.parametrize("mode", MODES)
def test_the_tokenizer_of_a_right_artifact_is_covered(mode, exported):
    directory = exported("bert", mode, task="text-classification")

    assert not failed(directory)
    assert told(directory, "tokenizer").covered


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model_max_length", 8, "cut at 8 tokens"),
        ("pad_token", "[UNK]", "filled up with '[UNK]'"),
        ("truncation_side", "left", "cut otherwise"),
    ],
)
def test_another_setting_of_the_tokenizer_fails(setting, value, message, exported, copied):
    directory = copied(exported("bert", "folded", task="text-classification"))
    changed(directory, "tokenizer_config.json", lambda content: content.update({setting: value}))

    found = failed(directory)

    assert found.keys() == {"texts"}
    assert message in found["texts"]


def test_a_lost_tokenizer_fails(exported, copied):
    directory = copied(exported("bert", "folded", task="text-classification"))
    for name in (TOKENIZER, "tokenizer_config.json"):
        (directory / name).unlink()
    Artifact.write(directory, _unchecked(directory))

    assert "has no tokenizer" in failed(directory)["texts"]


def test_a_base_model_without_a_tokenizer_is_told_as_not_covered(tiny_bert, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    directory = export_onnx([], tmp_path / "onnx", model=str(tmp_path / "base"), mode="folded")

    one = told(directory.directory, "tokenizer")

    assert not one.covered
    assert "no tokenizer" in one.detail
    assert not failed(directory.directory)


def test_the_tokenizer_of_an_adapter_of_its_own_is_the_right_one(
    make_world, tmp_path, tiny_checkpoint
):
    world = make_world("bert", "text-classification")
    adapter = shutil.copytree(world.one, tmp_path / "own")
    for name in (TOKENIZER, "tokenizer_config.json"):
        shutil.copyfile(tiny_checkpoint("bert", "text-classification") / name, adapter / name)
    content = json.loads((adapter / TOKENIZER).read_text())
    accents_stripped(content)
    (adapter / TOKENIZER).write_text(json.dumps(content))
    directory = export_onnx([adapter], tmp_path / "onnx", mode="folded").directory

    assert not failed(directory)
    (adapter / TOKENIZER).unlink()
    (adapter / "tokenizer_config.json").unlink()
    assert "texts" in failed(directory)


def test_settings_that_training_changed_are_expected(make_world, tmp_path):
    world = make_world("bert", "text-classification")
    adapter = shutil.copytree(world.one, tmp_path / "padded")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["tokenizer_settings"] = {"pad_token": "[UNK]"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    directory = export_onnx([adapter], tmp_path / "onnx", mode="switchable").directory

    assert not failed(directory)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, mode) for kind in ("gpt2", "llama", "t5") for mode in MODES),
        ("bart", "folded"),
        *(pytest.param("bart", mode, marks=pytest.mark.slow) for mode in MODES[1:]),  # three traces
    ],
)
def test_files_of_a_right_generative_artifact_pass(kind, mode, exported):
    directory = exported(kind, mode)

    assert not failed(directory)
    assert told(directory, "tokenizer").covered
    assert told(directory, "generation settings and chat templates").covered


def test_another_end_of_generated_text_fails(exported, copied):
    directory = copied(exported("llama", "switchable"))
    changed(directory, "generation_config.json", lambda c: c.update(eos_token_id=17))

    assert "eos_token_id is 17" in failed(directory)["settings"]


def test_another_first_token_of_a_decoder_fails(exported, copied):
    directory = copied(exported("bart", "folded"))
    for name in ("generation_config.json", "config.json"):
        changed(directory, name, lambda c: c.update(decoder_start_token_id=7))

    assert "begins with token 7" in failed(directory)["settings"]


def test_another_chat_template_fails(make_world, tmp_path):
    world = make_world("llama")
    adapter = shutil.copytree(world.one, tmp_path / "chat")
    (adapter / "chat_template.jinja").write_text(CHATML)
    directory = export_onnx([adapter], tmp_path / "onnx", mode="folded").directory
    assert not failed(directory)

    (directory / "chat_template.jinja").write_text(CHATML + " ")
    Artifact.write(directory, _unchecked(directory))

    assert "chat template of chat" in failed(directory)["settings"]


def test_a_merged_checkpoint_is_looked_at_too(make_world, tmp_path):
    world = make_world("bert", "text-classification")
    directory = merge(world.one, tmp_path / "merged").directory
    assert not failed(directory)

    changed(directory, TOKENIZER, case_kept)

    assert failed(directory).keys() == {"texts"}


@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_another_problem_type_fails(mode, export_world, copied):
    directory = copied(export_world(mode))
    entries = dict(Artifact.read(directory).manifest.adapters)
    entries["three"] = replace(entries["three"], problem_type="multi_label_classification")
    signed(directory, adapters=entries)

    assert "multi_label_classification" in failed(directory)["labels"]


def test_another_problem_type_in_a_bank_fails(banked, copied):
    directory = copied(banked)
    with sqlite3.connect(directory / "adapters/registry.sqlite") as db:
        (text,) = db.execute("SELECT entry FROM adapters WHERE name = 'three'").fetchone()
        entry = json.loads(text) | {"problem_type": "regression"}
        db.execute("UPDATE adapters SET entry = ? WHERE name = 'three'", [json.dumps(entry)])
        seal_again(db, "three")
    db.close()
    signed(directory)

    assert "regression" in failed(directory)["labels"]


def test_labels_of_the_base_model_in_another_order_fail(exported, copied):
    directory = copied(exported("bert", "switchable", task="text-classification"))
    base = Artifact.read(directory).manifest.base
    signed(directory, base=replace(base, labels=base.labels[::-1]))

    assert "the base model" in failed(directory)["labels"]


def test_labels_of_config_json_in_another_order_fail(folded, copied):
    directory = copied(folded)

    def change(content):
        names = content["id2label"]
        names["0"], names["1"] = names["1"], names["0"]

    changed(directory, "config.json", change)

    assert "config.json names" in failed(directory)["labels"]
