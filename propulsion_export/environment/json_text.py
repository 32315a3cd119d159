"""JSON text of values that may hold NaN or infinity, which JSON has no words for."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def to_json(
    value: Any, *, non_finite: Callable[[float], str | None], indent: int | None = None
) -> str:
    """JSON text of mappings, lists, tuples and plain values.

    Args:
        value: the value to write.
        non_finite: called with each NaN or infinity; returns what is written in its place.
        indent: spaces per level; None writes one line.
    """
    return json.dumps(_replaced(value, non_finite), indent=indent, allow_nan=False)


def _replaced(value: Any, non_finite: Callable[[float], str | None]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(item, non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, non_finite) for item in value]
    return non_finite(value) if isinstance(value, float) and not math.isfinite(value) else value
