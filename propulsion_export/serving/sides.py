"""Tensors for a model whose rotary frequencies depend on the longest row, see `rope_switch`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.base_model.rope_switch import dynamic_limit, rope_switches, side_of
from propulsion_export.errors import UsageError
from propulsion_export.runners.switching import feeds_of_rows


def check_sides(settings: Mapping[str, Any], inputs: Tensors, *, generates: bool) -> None:
    """Refuse rows that the model cannot compute as it computes them alone.

    Args:
        settings: the content of the model's config.json.
        inputs: int64 [batch, sequence] each.
        generates: whether the model is given each row's positions; others count padding.

    Raises:
        UsageError: a row is longer than the positions of a `dynamic` model, or is padded to a
            length on the other side of a switch.
    """
    switches, limit = rope_switches(settings), dynamic_limit(settings)
    lengths = _lengths(inputs)
    width = inputs["input_ids"].shape[1]
    findings = [
        f"row {row}: has {length} tokens, expected at most the model's {limit} positions: its "
        "dynamic rope changes with every further token"
        for row, length in enumerate(lengths, 1)
        if limit is not None and max(length, 0 if generates else width) > limit
    ]
    findings += [
        f"row {row}: its {length} tokens are padded to {width}, expected both on one side of "
        f"{' and '.join(map(str, switches))} tokens, where the model's rotary frequencies change"
        for row, length in enumerate(lengths, 1)
        if not generates and side_of(length, switches) != side_of(width, switches)
    ]
    if findings:
        raise UsageError(*findings, remedy="Give longer rows in a request of their own.")


def run_by_side(
    run: Runner, inputs: Tensors, feeds: Mapping[str, Any], switches: Sequence[int]
) -> Tensors:
    """Run the rows on each side of the switches in a batch of their own.

    Args:
        run: the model.
        inputs: [batch, sequence] each.
        feeds: the adapters' inputs.
        switches: lengths above which the model's rotary frequencies are others.
    """
    sides = np.array([side_of(length, switches) for length in _lengths(inputs)])
    if len(set(sides)) == 1:
        return run({**inputs, **feeds})
    whole: dict[str, Array] = {}
    for side in set(sides):
        rows = [int(row) for row in np.flatnonzero(sides == side)]
        own = {name: values[rows] for name, values in inputs.items()}
        for name, values in run({**own, **feeds_of_rows(feeds, rows)}).items():
            empty = np.empty((len(sides), *values.shape[1:]), values.dtype)
            whole.setdefault(name, empty)[rows] = values
    return whole


def _lengths(inputs: Tensors) -> list[int]:
    tokens = inputs["input_ids"]
    mask = inputs.get("attention_mask", np.ones_like(tokens))
    return [int(length) for length in mask.sum(1)]
