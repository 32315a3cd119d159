"""`functools.cached_property`, safe to use in a fork."""

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


class _Unlocked(functools.cached_property[T]):
    """Without the lock that all instances share in Python 3.11: a fork could inherit it locked.

    Python 3.12 dropped it. Remove this when 3.11 is no longer supported.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        super().__init__(function)
        self.lock = nullcontext()


if sys.version_info >= (3, 12):
    cached_property = functools.cached_property
else:
    cached_property = _Unlocked
