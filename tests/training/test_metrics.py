"""The numbers of a report follow from the Trainer's log and the predictions."""

import math
from types import SimpleNamespace

import pytest
import torch

from propulsion_export.training.encode import IGNORED
from propulsion_export.training.losses import guesses_and_losses
from propulsion_export.training.metrics import (
    class_scores,
    history_of,
    kind_of,
    loss_curve,
)

LOG = [
    {"loss": 4.0, "step": 2, "epoch": 0.67},
    {"loss": 1.0, "step": 3, "epoch": 1.0},
    {"eval_mean_loss": 2.5, "eval_accuracy": 0.5, "step": 3, "epoch": 1.0},
    {"loss": 0.5, "step": 6, "epoch": 2.0},
    {"eval_mean_loss": 2.0, "eval_accuracy": 0.75, "step": 6, "epoch": 2.0},
    {"train_loss": 9.0, "step": 6, "epoch": 2.0},
]


def test_an_epochs_loss_is_the_mean_over_its_steps():
    first, second = history_of(LOG)

    assert first["train_loss"] == pytest.approx((4.0 * 2 + 1.0) / 3)
    assert second == {
        "epoch": 2,
        "train_loss": 0.5,
        "validation_loss": 2.0,
        "validation_accuracy": 0.75,
    }
    assert loss_curve(LOG) == [(0.67, 4.0), (1.0, 1.0), (2.0, 0.5)]


def test_tokens_without_a_class_count_neither_in_accuracy_nor_in_loss():
    labels = torch.tensor([[1, 1, IGNORED], [2, IGNORED, IGNORED]])
    logits = torch.tensor([[[0.0, 9, 0], [9, 0, 0], [9, 9, 9]], [[0, 0, 9], [0, 9, 0], [5, 5, 5]]])

    guesses, losses = guesses_and_losses(logits, labels)
    prediction = SimpleNamespace(
        predictions=(guesses.numpy(), losses.numpy()), label_ids=labels.numpy()
    )

    small, large = (math.log(2 + math.exp(9)) - 9, math.log(2 + math.exp(9)))
    assert class_scores(prediction) == {
        "accuracy": pytest.approx(2 / 3),
        "mean_loss": pytest.approx((2 * small + large) / 3, rel=1e-5),
    }


def test_a_parameter_is_counted_by_what_its_name_says():
    names = {
        "base_model.model.bert.pooler.dense.propulsion_z.default": "vectors",
        "base_model.model.bert.pooler.dense.propulsion_bias.default": "biases",
        "base_model.model.classifier.modules_to_save.default.weight": "head",
    }

    assert {name: kind_of(name) for name in names} == names
