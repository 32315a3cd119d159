"""The numbers a training run reports."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from propulsion_export.base_model.tasks import Training
from propulsion_export.environment.machine import tool_versions
from propulsion_export.training.encode import IGNORED

VECTOR, BIAS = "propulsion_z", "propulsion_bias"
_PACKAGES = ("propulsion-export", "torch", "transformers", "peft")

History = list[dict[str, float]]


def class_scores(prediction: Any) -> dict[str, float]:
    """The share of right guesses and the mean loss, over the rows or tokens that have a class.

    Args:
        prediction: the Trainer's prediction, made with `guesses_and_losses`.
    """
    guesses, losses = prediction.predictions
    counted = prediction.label_ids != IGNORED
    right = guesses[counted] == prediction.label_ids[counted]
    return {"accuracy": float(right.mean()), "mean_loss": float(losses[counted].mean())}


def token_scores(prediction: Any) -> dict[str, float]:
    """The mean loss over all tokens that are learnt, and its exponential.

    Args:
        prediction: the Trainer's prediction, made with `token_losses` or `next_token_losses`.
    """
    counted = prediction.label_ids != IGNORED
    # In float64: there may be millions of tokens.
    loss = float(prediction.predictions[counted].mean(dtype="float64"))
    return {"perplexity": perplexity_of(loss), "mean_loss": loss}


def perplexity_of(loss: float) -> float:
    """The perplexity for a mean loss: its exponential; inf for a loss above 709."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def kind_of(parameter: str) -> str:
    """The kind of a trained parameter, by its name: `vectors`, `biases` or `head`."""
    if VECTOR in parameter:
        return "vectors"
    return "biases" if BIAS in parameter else "head"


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """How many numbers of each kind are trained."""
    counts = {"vectors": 0, "biases": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[kind_of(name)] += parameter.numel()
    return counts


def history_of(log: Iterable[Mapping[str, float]]) -> History:
    """Per epoch: mean training loss, validation loss and measure, from the Trainer's log.

    The measure is `validation_accuracy` or `validation_perplexity`, whichever was logged.

    The Trainer logs the mean loss since its last entry. `Watch` makes it log at the end of every
    epoch, so that no entry spans two.
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
                }
                | {f"validation_{name}": entry[f"eval_{name}"] for name in _measures(entry)}
            )
            losses = []
    return history


def best_epoch(history: History, training: Training) -> dict[str, float]:
    """The entry of the epoch that early stopping keeps: the best, and of equals the first."""
    if training.best_by == "accuracy":
        return max(history, key=lambda entry: entry["validation_accuracy"])
    return min(history, key=lambda entry: entry["validation_loss"])


def loss_curve(log: Iterable[Mapping[str, float]]) -> list[tuple[float, float]]:
    """Points (epoch, training loss), several per epoch."""
    return [(entry["epoch"], entry["loss"]) for entry in log if "loss" in entry]


def versions() -> dict[str, str]:
    """The versions of the packages that affect the trained values."""
    installed = tool_versions()
    return {package: installed[package] for package in _PACKAGES}


def _measures(entry: Mapping[str, float]) -> list[str]:
    return [name for name in ("accuracy", "perplexity") if f"eval_{name}" in entry]
