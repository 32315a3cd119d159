"""Whether a tokenizer's files number its tokens below a model's embeddings, without loading it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from propulsion_export.base_model.config import read_settings_file
from propulsion_export.base_model.tokenizer.classes import NAMED
from propulsion_export.base_model.tokenizer.files import TOKENIZER_CONFIG, VOCABULARY_FILES
from propulsion_export.errors import ArtifactError

_TOKENIZER, _ADDED = "tokenizer.json", "added_tokens.json"
_OWN_NAMES = ("bos_token", "eos_token", "unk_token")
_ROOM = 8  # special tokens that a class may add though no file names them


def all_ids_below(directory: Path, rows: Any, more: Iterable[str] = ()) -> bool:
    """Whether that is certain; also without a tokenizer.

    A class adds special tokens that the vocabulary lacks, with the next numbers. It is certain if
    every token that a file names has a number, and there is room for others, or none is left to
    the class.

    Args:
        directory: of the checkpoint.
        rows: how many embeddings the model has.
        more: special tokens that are named elsewhere.
    """
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        return True
    try:
        settings = read_settings_file(directory / TOKENIZER_CONFIG)
        numbers = _numbers(directory, settings)
        named = {*_named(settings), *more}
    except (ArtifactError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    highest = max(numbers.values(), default=0)
    closed = all(name in settings for name in _OWN_NAMES)
    return named <= numbers.keys() and highest + (1 if closed else _ROOM) <= int(rows)


def _numbers(directory: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """The number of every token that a file has."""
    content = json.loads((directory / _TOKENIZER).read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    pairs = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((entry[0], number) for number, entry in enumerate(vocabulary))
    )
    numbers = {str(token): int(number) for token, number in pairs}
    numbers |= {token["content"]: int(token["id"]) for token in content.get("added_tokens") or ()}
    numbers |= {token: int(n) for token, n in read_settings_file(directory / _ADDED).items()}
    decoder = settings.get("added_tokens_decoder") or {}
    return numbers | {_content(token): int(number) for number, token in decoder.items()}


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that tokenizer_config.json names."""
    more = settings.get("additional_special_tokens") or []
    extra = settings.get("extra_special_tokens") or []
    values = [settings[name] for name in NAMED if settings.get(name)]
    values += more + list(extra.values() if isinstance(extra, dict) else extra)
    yield from map(_content, values)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
