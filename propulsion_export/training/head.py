"""The accuracy of the task head alone on the frozen base model, which an adapter has to beat."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from propulsion_export.training.encode import (
    IGNORED,
    Batch,
    Collate,
    EncodedRow,
    Rows,
)
from propulsion_export.training.model import TrainableBase
from propulsion_export.training.options import TrainOptions

_CACHE_BYTES = 2 * 2**30


def head_only_accuracy(
    base: TrainableBase, rows: Rows, options: TrainOptions, device: torch.device
) -> float | None:
    """Train a copy of the head on the frozen base model's outputs, and return its accuracy.

    None where its logits are not finite: the training diverged.

    Epochs, batch size, rate, schedule and optimiser are those of the adapter's training. The
    batches are drawn once, so that the base model computes each batch once; its outputs are cached
    up to 2 GiB. `base` and the random state are left as they were.
    """
    model = base.model.to(device)
    with torch.random.fork_rng(), _trial_heads(base), _cached_outputs(model) as cache:
        torch.manual_seed(options.seed)
        batches = _batches(rows.training, rows.collate, options.batch_size, shuffle=True)
        _fit(base, batches, cache, options)
        model.eval()
        cache.batch = None
        validation = _batches(rows.validation, rows.collate, options.batch_size, shuffle=False)
        return _accuracy(model, validation)


@dataclass
class _Cache:
    """Outputs of the base model by batch number; `batch` is the number of the running batch."""

    outputs: dict[int, Any] = field(default_factory=dict)
    size: int = 0
    batch: int | None = None

    def keep(self, output: Any) -> None:
        size = sum(value.nbytes for value in output.values())
        if self.batch is not None and self.size + size <= _CACHE_BYTES:
            self.outputs[self.batch] = output
            self.size += size


@contextmanager
def _cached_outputs(model: Any) -> Iterator[_Cache]:
    """Cache the outputs of the frozen base model inside `model`, as float32."""
    base, cache = getattr(model, model.base_model_prefix), _Cache()
    forward = base.forward

    def cached(*args: Any, **kwargs: Any) -> Any:
        if cache.batch in cache.outputs:
            return cache.outputs[cache.batch]
        with torch.no_grad():
            output = forward(*args, **kwargs)
        tensors = {name: value.float() for name, value in output.items() if torch.is_tensor(value)}
        output = type(output)(**tensors)
        cache.keep(output)
        return output

    base.forward = cached
    try:
        yield cache
    finally:
        del base.forward


@contextmanager
def _trial_heads(base: TrainableBase) -> Iterator[None]:
    """Put float32 copies of the heads into the model inside the block."""
    kept = {name: getattr(base.model, name) for name in base.heads}
    for name, head in kept.items():
        setattr(base.model, name, copy.deepcopy(head).float())
    try:
        yield
    finally:
        for name, head in kept.items():
            setattr(base.model, name, head)


def _fit(base: TrainableBase, batches: list[Batch], cache: _Cache, options: TrainOptions) -> None:
    model = base.model.train()
    getattr(model, model.base_model_prefix).eval()
    head = [weight for name in base.heads for weight in getattr(model, name).parameters()]
    optimizer = torch.optim.AdamW(head, lr=options.head_learning_rate, weight_decay=0.0)
    steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(options.epochs):
        for number in torch.randperm(len(batches)).tolist():
            cache.batch = number
            model(**_on(batches[number], model.device)).loss.backward()
            torch.nn.utils.clip_grad_norm_(head, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def _accuracy(model: Any, batches: list[Batch]) -> float | None:
    right = counted = 0
    for batch in batches:
        labels = batch["labels"].to(model.device)
        logits = model(**_on(batch, model.device)).logits
        if not logits[labels != IGNORED].isfinite().all():
            return None
        right += int((logits.argmax(-1) == labels).sum())  # a guess is never IGNORED
        counted += int((labels != IGNORED).sum())
    return right / counted


def _batches(
    rows: Sequence[EncodedRow], collate: Collate, size: int, *, shuffle: bool
) -> list[Batch]:
    order = torch.randperm(len(rows)).tolist() if shuffle else range(len(rows))
    return [
        collate([rows[index] for index in order[start : start + size]])
        for start in range(0, len(rows), size)
    ]


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}
