"""The numbers a training run reports."""

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from propulsion_export.training.encode import IGNORED

VECTOR, BIAS = "propulsion_z", "propulsion_bias"
_PACKAGES = ("propulsion-export", "torch", "transformers", "peft")

History = list[dict[str, float]]


def guesses_and_losses(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest class of each row or token, and its cross-entropy, both of `labels`' shape.

    Small enough to be gathered, where logits are not; a mean over gathered losses counts no row
    twice, as the Trainer's own does when processes do not share the last batch evenly.
    """
    losses = functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none"
    )
    return logits.argmax(-1), losses.view(labels.shape)


def scores(prediction: Any) -> dict[str, float]:
    """The share of right guesses and the mean loss, over what has a class."""
    guesses, losses = prediction.predictions
    counted = prediction.label_ids != IGNORED
    right = guesses[counted] == prediction.label_ids[counted]
    return {"accuracy": float(right.mean()), "mean_loss": float(losses[counted].mean())}


def kind_of(parameter: str) -> str:
    """What a trained parameter is, by its name: `vectors`, `biases` or `head`."""
    if VECTOR in parameter:
        return "vectors"
    return "biases" if BIAS in parameter else "head"


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """How many numbers are trained, of each kind."""
    counts = {"vectors": 0, "biases": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[kind_of(name)] += parameter.numel()
    return counts


def history_of(log: Iterable[Mapping[str, float]]) -> History:
    """Per epoch: mean training loss, validation loss and accuracy, from the Trainer's log.

    The Trainer logs the mean loss since its last entry, and our callback lets it log at the end of
    every epoch, so no entry spans two.
    """
    history: History = []
    losses: list[tuple[float, int]] = []
    step = 0
    for entry in log:
        if "loss" in entry:
            losses.append((entry["loss"], int(entry["step"]) - step))
            step = int(entry["step"])
        elif "eval_mean_loss" in entry:
            steps = sum(count for _, count in losses)
            history.append(
                {
                    "epoch": len(history) + 1,
                    "train_loss": sum(loss * count for loss, count in losses) / steps,
                    "validation_loss": entry["eval_mean_loss"],
                    "validation_accuracy": entry["eval_accuracy"],
                }
            )
            losses = []
    return history


def loss_curve(log: Iterable[Mapping[str, float]]) -> list[tuple[float, float]]:
    """Points (epoch, training loss), several an epoch."""
    return [(entry["epoch"], entry["loss"]) for entry in log if "loss" in entry]


def versions() -> dict[str, str]:
    """The versions of the packages that decide what is trained."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}
