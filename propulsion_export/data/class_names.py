"""Class numbers by name, as the description of a data set's columns names them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from propulsion_export.data.rows import DataRow, UnnamedClass

_LISTS = ("Sequence", "List", "LargeList")


def with_class_names(rows: Iterable[DataRow], features: Mapping[str, Any]) -> Iterator[DataRow]:
    """Rows with the names of classes in place of their numbers, in lists of labels too.

    A number without a name becomes an `UnnamedClass`.

    Args:
        rows: the rows.
        features: the columns as `datasets` describes them in JSON.
    """
    named = classes_by_column(features)
    for where, row in rows:
        own = {column: _named(row[column], named[column]) for column in named if column in row}
        yield where, {**row, **own}


def classes_by_column(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of classes by column, for the columns that hold class numbers or lists of them."""
    return {column: names for column, one in features.items() if (names := _class_names(one))}


def _class_names(feature: Any) -> list[str] | None:
    """The names of a column's classes, or of the classes in its lists; None for other columns."""
    if isinstance(feature, list) and len(feature) == 1:  # a list, as older versions write it
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind in _LISTS:
        return _class_names(feature.get("feature"))
    if kind != "ClassLabel":
        return None
    return feature.get("names") or [str(number) for number in range(feature.get("num_classes", 0))]


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if isinstance(value, str) and value not in names and value.removeprefix("-").isdecimal():
        value = int(value)  # a number in a CSV file
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else UnnamedClass(value, len(names))
