"""Refuse an adapter whose own tokenizer is not that of a GGUF file."""

import json
from pathlib import Path
from typing import Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.gguf.header import Header
from propulsion_export.errors import AdapterError

_FILE = "tokenizer.json"


def check_tokens(adapter: Adapter, directory: Path, header: Header) -> None:
    """Refuse an adapter that brings a tokenizer with tokens which the file numbers otherwise.

    A directory without `tokenizer.json` is taken to have no tokenizer of its own.

    Raises:
        AdapterError: naming a token.
    """
    own, theirs = directory / _FILE, header.metadata.get("tokenizer.ggml.tokens")
    if not own.is_file() or not isinstance(theirs, list):
        return
    for token, number in _numbers(adapter, own).items():
        found = theirs[number] if 0 <= number < len(theirs) else None
        if found != token:
            raise AdapterError(
                f"adapter {adapter.name}: its own tokenizer has {token!r} as token {number}, "
                f"{header.file} has {'none' if found is None else repr(found)}",
                remedy="Merge into the model's safetensors checkpoint, and convert that with "
                "llama.cpp.",
            )


def _numbers(adapter: Adapter, file: Path) -> dict[str, int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        numbers = _of_pairs(vocabulary) if isinstance(vocabulary, list) else dict(vocabulary)
        return numbers | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"adapter {adapter.name}: {file} is no tokenizer ({error!r})", remedy="Copy it again."
        ) from error


def _of_pairs(vocabulary: list[Any]) -> dict[str, int]:
    """Of a Unigram model: tokens with their scores, numbered by their order."""
    return {token: number for number, (token, _) in enumerate(vocabulary)}
