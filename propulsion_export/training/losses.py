"""Cross-entropy losses, by class or by next token, over the labels that are not `IGNORED`."""

from typing import Any

import torch
from torch.nn import functional

from propulsion_export.training.encode import IGNORED


def mean_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean loss over all labels of an optimiser step's batch.

    Such a batch spans all processes and all accumulated steps. A model's own loss is the mean over
    one process's share, which the Trainer takes for a share of the whole mean and multiplies by
    the number of processes (transformers 5.24).

    Args:
        outputs: the model's outputs, with `logits` of shape [..., classes].
        labels: class numbers, shape [...]; `IGNORED` ones are not counted.
        num_items_in_batch: the number of counted labels in the whole batch.
    """
    logits = outputs.logits.float().flatten(0, -2)
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    total = functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    return total / count


def mean_next_token_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """`mean_cross_entropy` for a decoder, whose logits at one token predict the next.

    Args:
        outputs: the model's outputs, with `logits` of shape [rows, length, tokens].
        labels: token ids, shape [rows, length]; the first of a row is `IGNORED`.
        num_items_in_batch: the number of counted labels in the whole batch.
    """
    return mean_cross_entropy(outputs, _next(labels), num_items_in_batch)


def guesses_and_losses(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest class of each row or token, and its cross-entropy, both in `labels`' shape.

    The loss is NaN where a logit is not finite: the likeliest class is meaningless there.

    Unlike logits they are small enough to be gathered from all processes. A mean over gathered
    losses counts no row twice; the Trainer's own mean does if the processes do not share the last
    batch evenly.
    """
    losses = _losses(logits, labels)
    return logits.argmax(-1), losses.where(logits.isfinite().all(-1), torch.nan)


def token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each label of an encoder-decoder, whose logits come in a tuple."""
    return _losses(_first(logits), labels)


def next_token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each label of a decoder, at the label's own position.

    The first label of a row is not predicted: its loss is 0.
    """
    return _losses(_first(logits), _next(labels)).roll(1, dims=-1)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none"
    )
    return losses.view(labels.shape)


def _next(labels: torch.Tensor) -> torch.Tensor:
    """The labels moved one position earlier, to where they are predicted."""
    return functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _first(logits: Any) -> torch.Tensor:
    first: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first
