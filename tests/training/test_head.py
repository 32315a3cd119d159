"""The head alone is trained on the frozen base model, once through it, and nothing is changed."""

import copy

import pytest
import torch
import transformers

from propulsion_export.training import TrainOptions, head
from propulsion_export.training.data import classes_of, read_examples
from propulsion_export.training.encode import Rows, encode
from propulsion_export.training.model import load_trainable

CPU = torch.device("cpu")
OPTIONS = TrainOptions(epochs=4, batch_size=16)


@pytest.fixture(name="base")
def make_base(tiny_base):
    return load_trainable(tiny_base, ["animal", "food", "place"], OPTIONS)


@pytest.fixture(name="rows")
def make_rows(base, texts, held_out_texts):
    training = read_examples(texts, OPTIONS.columns)
    validation = read_examples(held_out_texts, OPTIONS.columns)
    classes = classes_of(texts, training)
    return Rows(
        encode(training, classes, base.tokenizer, 32),
        encode(validation, classes, base.tokenizer, 32),
        transformers.DataCollatorWithPadding(base.tokenizer),
    )


def test_the_base_model_runs_once_over_the_data_and_not_once_an_epoch(base, rows):
    calls = []
    base.model.bert.embeddings.register_forward_hook(lambda *_: calls.append(1))

    head.head_only_accuracy(base, rows, OPTIONS, CPU)

    assert len(calls) == 96 // 16 + 2


def test_the_outputs_kept_give_what_running_again_gives(base, rows, monkeypatch):
    kept = head.head_only_accuracy(base, rows, OPTIONS, CPU)
    monkeypatch.setattr(head, "_CACHE_BYTES", 0)
    calls = []
    base.model.bert.embeddings.register_forward_hook(lambda *_: calls.append(1))

    assert head.head_only_accuracy(base, rows, OPTIONS, CPU) == kept
    assert len(calls) == 4 * 96 // 16 + 2


def test_the_model_and_the_random_state_stay_as_they_were(base, rows):
    before = copy.deepcopy(base.model.state_dict())
    classifier, random = base.model.classifier, torch.get_rng_state()

    head.head_only_accuracy(base, rows, OPTIONS, CPU)

    assert base.model.classifier is classifier
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" not in vars(base.model.bert)
    for name, weight in base.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_the_head_learns(base, rows):
    untrained = head.head_only_accuracy(base, rows, TrainOptions(head_learning_rate=1e-9), CPU)
    trained = head.head_only_accuracy(base, rows, TrainOptions(epochs=10, batch_size=16), CPU)

    assert trained > untrained + 0.1


def test_a_head_that_diverged_has_no_accuracy(base, rows):
    with torch.no_grad():
        base.model.classifier.bias[1] = torch.inf

    assert head.head_only_accuracy(base, rows, OPTIONS, CPU) is None
