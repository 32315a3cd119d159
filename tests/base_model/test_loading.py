"""A base model is loaded for the right task, whole, or not at all."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model import config as config_file
from propulsion_export.base_model import loading as base
from propulsion_export.base_model.tokenizer.reading import copy_tokenizer, read_tokenizer
from propulsion_export.errors import BaseModelError

LABELS = ("no", "yes", "maybe")


def test_loaded_model_is_frozen_in_evaluation_mode_and_complete(tiny_checkpoint):
    loaded = base.load_base(str(tiny_checkpoint()), task="text-classification")

    assert not loaded.missing
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    loaded.check_complete([])


def test_dtype_asked_for_is_loaded_and_else_the_checkpoints_own(tiny_bert, tmp_path):
    tiny_bert().to(torch.bfloat16).save_pretrained(tmp_path)

    own = base.load_base(str(tmp_path), task="text-classification")
    asked = base.load_base(str(tmp_path), task="text-classification", dtype=torch.float64)

    assert own.model.dtype == torch.bfloat16
    assert asked.model.dtype == torch.float64


def test_random_head_is_refused_unless_the_adapter_brings_it(tiny_checkpoint):
    source = str(tiny_checkpoint("bert", "feature-extraction"))

    loaded = base.load_base(source, task="text-classification")

    assert loaded.missing == {"classifier.weight", "classifier.bias"}
    with pytest.raises(BaseModelError, match=r"classifier\.bias is neither"):
        loaded.check_complete(["classifier.weight"])
    loaded.check_complete(["classifier.weight", "classifier.bias"])


@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_with_another_room_keeps_what_fits_of_the_checkpoints(labels, tiny_checkpoint):
    loaded = base.load_base(str(tiny_checkpoint()), task="text-classification")
    before = loaded.model.classifier.weight.clone()

    loaded.make_room_(labels)

    head = loaded.model.classifier
    assert (loaded.room, head.out_features, head.bias.shape) == (labels, labels, (labels,))
    torch.testing.assert_close(head.weight[:3], before[:labels], rtol=0, atol=0)
    assert not head.weight[3:].any()
    assert loaded.own_labels == LABELS


def test_names_come_first_in_the_configuration_of_a_head_with_more_room(tiny_checkpoint):
    source = str(tiny_checkpoint("bert", "feature-extraction"))
    loaded = base.load_base(source, task="token-classification")

    loaded.make_room_(3, ["x", "y"])

    config = loaded.model.config
    assert config.id2label == {0: "x", 1: "y", 2: "LABEL_2"}
    assert config.label2id == {"x": 0, "y": 1, "LABEL_2": 2}
    assert config.num_labels == 3


@pytest.mark.parametrize("kind", ["bert", "roberta", "albert", "mpnet"])
def test_pooler_that_the_checkpoint_does_not_have_is_left_out(kind, tiny_checkpoint):
    source = str(tiny_checkpoint(kind, "fill-mask"))

    loaded = base.load_base(source, task="feature-extraction")

    assert not loaded.missing
    assert not any("pooler" in name for name, _ in loaded.model.named_modules() if "." in name)
    assert not hasattr(loaded.model.pooler, "dense")


def test_pooler_that_the_checkpoint_has_is_kept(tiny_checkpoint):
    source = str(tiny_checkpoint("bert", "feature-extraction"))

    assert base.load_base(source, task="feature-extraction").model.pooler is not None


def test_classifier_on_a_random_pooler_is_refused(tiny_checkpoint):
    loaded = base.load_base(str(tiny_checkpoint("bert", "fill-mask")), task="text-classification")

    with pytest.raises(BaseModelError, match=r"bert\.pooler\.dense\.bias"):
        loaded.check_complete(["classifier.weight", "classifier.bias"])


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def no_weights(directory):
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, pickle_only, no_weights])
def test_checkpoint_without_whole_safetensors_is_refused(damage, tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint(), tmp_path / "source")
    damage(source)

    with pytest.raises(BaseModelError, match="cannot be loaded"):
        base.load_base(str(source), task="text-classification")


def test_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        config_file.read_config(str(tmp_path))


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-model"}'], ids=["cut", "unknown"])
def test_configuration_that_cannot_be_read_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(BaseModelError, match="no transformers checkpoint can be loaded"):
        config_file.read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "task", "names"),
    [
        ("bert", "text-classification", {"classifier.weight", "classifier.bias"}),
        ("bert", "token-classification", {"classifier.weight", "classifier.bias"}),
        ("bert", "question-answering", set()),
        (
            "roberta",
            "text-classification",
            {"classifier.out_proj.weight", "classifier.out_proj.bias"},
        ),
        ("distilbert", "text-classification", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_label_parameters_are_found_in_every_head(kind, task, names, tiny_model):
    config = tiny_model(kind, task).config
    before = config.to_dict()

    assert base.label_parameters(base.model_class_of(task), config, task) == names
    assert config.to_dict() == before


def test_empty_model_has_no_weights_and_a_head_for_the_adapters_labels(tiny_checkpoint):
    config = config_file.read_config(str(tiny_checkpoint("roberta", "feature-extraction")))
    head = {"classifier.out_proj.weight": np.zeros((4, 32), np.float32)}
    adapter = Adapter("a", {}, modules=head, labels=("w", "x", "y", "z"))

    model = base.load_empty(
        config, "text-classification", head=adapter.modules, labels=adapter.labels
    )

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.classifier.out_proj.out_features == 4
    assert model.config.id2label == {0: "w", 1: "x", 2: "y", 3: "z"}


def test_empty_model_keeps_the_checkpoints_labels_when_the_adapter_has_no_head(tiny_checkpoint):
    config = config_file.read_config(str(tiny_checkpoint()))

    model = base.load_empty(config, "text-classification", head={}, labels=None)

    assert model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("task", ["text2text-generation", "text-classification"])
def test_a_model_that_is_for_no_such_task_is_refused(task, tmp_path):
    transformers.CLIPConfig().save_pretrained(tmp_path)
    config = config_file.read_config(str(tmp_path))

    with pytest.raises(BaseModelError, match=f"{tmp_path}: is a clip, .* Is it for another --task"):
        base.load_empty(config, task, head={}, labels=None)


def test_written_configuration_names_labels_and_dtype_and_no_path(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    loaded = base.load_base(str(source), task="text-classification")

    config_file.save_config(loaded.model, tmp_path, "float16")

    text = (tmp_path / "config.json").read_text()
    content = json.loads(text)
    assert content["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert content["architectures"] == ["BertForSequenceClassification"]
    assert content["dtype"] == "float16"
    assert str(source) not in text
    assert "_name_or_path" not in content


def test_tokenizer_is_copied_byte_for_byte(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()

    copy_tokenizer(str(source), tmp_path)

    copied = sorted(file.name for file in tmp_path.iterdir())
    assert copied == ["tokenizer.json", "tokenizer_config.json"]
    for name in copied:
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    assert read_tokenizer(tmp_path)("ba")["input_ids"] == [2, 5, 3]


def test_checkpoint_without_a_tokenizer_has_none_to_copy(tiny_bert, tmp_path):
    (tmp_path / "source").mkdir()
    tiny_bert().save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()

    copy_tokenizer(str(tmp_path / "source"), tmp_path / "out")

    assert not list((tmp_path / "out").iterdir())
    assert read_tokenizer(tmp_path / "source") is None


SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rotary"),
    [
        ("llama", {"rope_theta": 500000.0}),
        ("llama", {"rope_theta": 500000.0, "rope_scaling": SCALING}),
        ("modernbert", {"global_rope_theta": 12345.0, "local_rope_theta": 54321.0}),
        ("gpt_neox", {"rotary_emb_base": 12345, "rotary_pct": 0.5}),
    ],
)
def test_rotary_settings_stay_where_older_readers_look(kind, rotary, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 9}
    source.mkdir()
    saved.mkdir()
    sizes |= {"intermediate_size": 37, "pad_token_id": 0}
    written = {"model_type": kind, **sizes, **rotary}
    (source / "config.json").write_text(json.dumps(written))
    config = config_file.read_config(str(source))
    model = base.load_empty(
        config,
        "text-classification",
        head={},
        labels=None,
    )

    config_file.save_config(model, saved, "float32")

    content = json.loads((saved / "config.json").read_text())
    assert {name: content[name] for name in rotary} == rotary
    again = config_file.read_config(str(saved))
    assert again.rope_parameters == config.rope_parameters


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_told_without_asking_a_hub(source, monkeypatch):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: 1 / 0)

    with pytest.raises(BaseModelError, match="does not exist, expected a directory"):
        config_file.read_config(source)


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_weights_of_another_shape_inside_the_base_are_refused(task, tiny_checkpoint, tmp_path):
    directory = shutil.copytree(tiny_checkpoint("bert", "feature-extraction"), tmp_path / "base")
    file = directory / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "vocab_size": settings["vocab_size"] + 3}))

    with pytest.raises(BaseModelError, match=r"word_embeddings\.weight has the shape"):
        base.load_base(str(directory), task=task)
