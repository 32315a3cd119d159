"""Convert plain JSON values to annotated dataclasses, with errors that name the field."""

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tasks import TASKS, TaskName


def convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a plain JSON value to the type `kind`, dataclasses and containers included.

    Args:
        kind: a type or annotation.
        value: the JSON value.
        where: the name of the value in messages, such as `manifest.base`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the value does not have this type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if kind is Fingerprint:
        return Fingerprint.from_json(value)
    if is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, where)
    if kind is TaskName or origin is Literal:
        known = tuple(TASKS) if kind is TaskName else arguments
        if value not in known:
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(map(str, known))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is None:
        return _expect(value, kind, where)
    return _convert_container(origin, arguments, value, where)


def _convert_container(origin: type, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is dict:
        _expect(value, dict, where)
        return {k: convert(arguments[1], item, f"{where}.{k}") for k, item in value.items()}
    _expect(value, list, where)
    return origin(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))


def _convert_dataclass(kind: type, value: Any, where: str) -> Any:
    _expect(value, dict, where)
    hints, needed = _fields_of(kind)
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"{where} has the unknown field {min(unknown)!r}")
    if lacking := needed - value.keys():
        raise ValueError(f"{where} lacks the field {min(lacking)!r}")
    return kind(**{k: convert(hints[k], item, f"{where}.{k}") for k, item in value.items()})


@cache  # evaluating the annotations takes longer than reading a manifest
def _fields_of(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """The type of each field of a dataclass, and the fields that have no default."""
    hints = typing.get_type_hints(kind)
    every = fields(kind)
    needed = (
        item.name for item in every if (item.default, item.default_factory) == (MISSING, MISSING)
    )
    return {item.name: hints[item.name] for item in every}, frozenset(needed)


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    reason = f"{where} is {value!r}"
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return convert(kind, value, where)
        except ValueError as error:
            reason = str(error)
    raise ValueError(reason)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, expected {kind.__name__}")
    return value
