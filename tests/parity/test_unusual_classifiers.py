"""Classifiers that look for padding among the tokens, or have no mask at all."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_models import save_tokenizer

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.parity import check_parity


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=100,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=80,
        num_labels=3,
        bos_token_id=2,
        eos_token_id=3,
    )
    return transformers.GPT2ForSequenceClassification(config)


def fnet():
    config = transformers.FNetConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=40,
        num_labels=3,
    )
    return transformers.FNetForSequenceClassification(config)


@pytest.fixture
def merged(positive_adapter, write_adapter, tmp_path):
    def make(make_model):
        torch.manual_seed(0)
        model = make_model().eval()
        model.save_pretrained(tmp_path / "base")
        save_tokenizer(tmp_path / "base")
        adapter = positive_adapter(model, 1, "one", task="text-classification")
        fingerprint = fingerprint_of_model(model)
        adapter = replace(adapter, base=str(tmp_path / "base"), fingerprint=fingerprint)
        merge(write_adapter(adapter, tmp_path / "one"), tmp_path / "merged")
        return tmp_path / "merged"

    return make


def test_a_model_without_a_mask_is_judged(merged):
    report = check_parity(merged(fnet))

    assert report.passed
    assert not any("mask" in one.what for one in report.coverage)


def test_the_padding_token_that_a_classifier_looks_for_is_compared(merged):
    directory = merged(gpt2)
    assert check_parity(directory, effort="quick").passed
    manifest = Artifact.read(directory).manifest
    config = json.loads((directory / "config.json").read_text())
    wrong = config | {"pad_token_id": config["pad_token_id"] + 1}
    (directory / "config.json").write_text(json.dumps(wrong))
    Artifact.write(directory, manifest)

    report = check_parity(directory, effort="quick")

    (check,) = [check for check in report.checks if not check.passed]
    assert check.case == "texts"
    assert "pad_token_id is 1, expected 0" in check.detail
