"""Pad heads with different numbers of labels to one size, so that they fit one model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array


def labels_of(adapters: Sequence[Adapter], label_parameters: frozenset[str]) -> int | None:
    """The largest number of labels of any adapter's head; None if no adapter has a head."""
    counts = [
        values.shape[0]
        for adapter in adapters
        for name, values in adapter.modules.items()
        if name in label_parameters
    ]
    return max(counts, default=None)


def with_room(adapter: Adapter, labels: int | None, label_parameters: frozenset[str]) -> Adapter:
    """The adapter with its head padded by zero rows to `labels` labels."""
    if labels is None:
        return adapter
    modules = {
        name: _padded(values, labels) if name in label_parameters else values
        for name, values in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def without_scales(adapter: Adapter) -> Adapter:
    """The adapter without its scales and trained biases: only its head."""
    return replace(adapter, scales={}, biases={})


def _padded(values: Array, rows: int) -> Array:
    padded = np.zeros((rows, *values.shape[1:]), values.dtype)
    padded[: values.shape[0]] = values
    return padded
