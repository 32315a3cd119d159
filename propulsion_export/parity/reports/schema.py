"""The JSON schema of `parity.json`, made from the dataclasses that are written to it."""

import inspect
import json
import re
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from propulsion_export.parity.comparison import OutputErrors
from propulsion_export.parity.reports.report import (
    SCHEMA_VERSION,
    Check,
    ParityReport,
    Verdict,
)

SCHEMA_FILE = Path(__file__).with_name("parity.schema.json")
_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
_PLAIN = {str: "string", bool: "boolean", int: "integer", type(None): "null"}
_RULE = (
    "A version keeps its fields and their meaning. Fields, cases and tools may be added to it, so "
    "readers ignore what they do not know; anything else is a new schema_version."
)


def to_schema() -> dict[str, Any]:
    """The schema, in JSON Schema's draft 2020-12; numbers that are not finite are strings."""
    report = _object(ParityReport)
    report["properties"] = {
        "schema_version": {"const": SCHEMA_VERSION, "description": _RULE},
        "verdict": {"enum": list(get_args(Verdict)), "description": "Only `passed` is a pass."},
        "margin": {
            "anyOf": [*_NUMBER["anyOf"], {"type": "null"}],
            "description": "The smallest share of allowed error that is left; null if none ran.",
        },
        "factor": {"type": "number", "description": "Allowed error over PyTorch's own."},
        "histogram_decades": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "Edges of the histograms, as powers of 10.",
        },
    } | report["properties"]
    report["required"] = list(report["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Verdict of propulsion-export parity",
        **report,
    }


def schema_text() -> str:
    """The schema as the text of SCHEMA_FILE."""
    return json.dumps(to_schema(), indent=2) + "\n"


def _object(of: type) -> dict[str, Any]:
    """The schema of a dataclass with the descriptions in its docstring."""
    hints, told = get_type_hints(of), _attributes(of)
    names = [entry.name for entry in fields(of)]
    properties = {name: _value(hints[name]) | told.get(name, {}) for name in names}
    if of is Check:
        # A later release may add cases to this version of the schema.
        properties["case"] = {
            "type": "string",
            "examples": list(get_args(hints["case"])),
            **told["case"],
        }
    if of is OutputErrors:
        properties |= {"passed": {"type": "boolean"}, "margin": _NUMBER}
    summary = (inspect.getdoc(of) or "").partition("\n")[0]
    return {
        "type": "object",
        "description": summary,
        "properties": properties,
        "required": list(properties),
    }


def _value(hint: Any) -> dict[str, Any]:
    """The schema of a field's type."""
    inner = get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _object(hint)
    if get_origin(hint) is Literal:
        return {"enum": list(inner)}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _value(inner[0])}
    if get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": _value(inner[1])}
    if get_origin(hint) in (Union, types.UnionType):
        return {"anyOf": [_value(one) for one in inner]}
    return _NUMBER if hint is float else {"type": _PLAIN[hint]}


def _attributes(of: type) -> dict[str, dict[str, str]]:
    """What the docstring says about each attribute."""
    _, _, text = (inspect.getdoc(of) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", text, re.MULTILINE)
    return {name: {"description": " ".join(words.split())} for name, words in entries}


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
