"""The tokenizer that an adapter brings beside its weights, in place of the base model's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propulsion_export.base_model.tokenizer.files import VOCABULARY_FILES
from propulsion_export.base_model.tokenizer.reading import read_serving_tokenizer, read_tokenizer
from propulsion_export.base_model.tokenizer.token_ids import named_tokens, numbers_of
from propulsion_export.errors import AdapterError

# Files that hold no whole vocabulary.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def has_own_tokenizer(directory: Path) -> bool:
    """Whether an adapter's directory holds a vocabulary."""
    names = [name for name in VOCABULARY_FILES if name not in _SETTINGS]
    return any((directory / name).is_file() for name in names)


def tokenizer_source(directories: Mapping[str, Path], base: str) -> str:
    """Where the tokenizer of adapters and their base model is: in an adapter's directory or `base`.

    Args:
        directories: the adapters' directories by name.
        base: directory or name of the base model.

    Raises:
        AdapterError: two adapters, or an adapter without one and another, need different ones.
        BaseModelError: a tokenizer cannot be read.
    """
    own = {name: place for name, place in directories.items() if has_own_tokenizer(place)}
    if not own:
        return base
    first, place = next(iter(own.items()))
    chosen = read_tokenizer(place)
    others = {name: str(own.get(name, base)) for name in directories if name != first}
    for name, other in others.items():
        if difference := _difference(chosen, read_tokenizer(other)):
            raise AdapterError(
                f"adapters {first} and {name}: were trained with different tokenizers: {first}'s "
                f"has {difference}",
                remedy="Export each on its own.",
            )
    return str(place)


def check_tokenizer(name: str, directory: Path, artifact: Path) -> None:
    """Refuse to add an adapter whose own tokenizer numbers tokens otherwise than an artifact's.

    Raises:
        AdapterError: naming tokens that differ.
        ArtifactError: a tokenizer cannot be read.
        UnavailableError: a tokenizer needs a package that is not installed.
    """
    if not has_own_tokenizer(directory) or _same_file(directory, artifact):
        return
    theirs = read_serving_tokenizer(artifact)
    if theirs is None:
        return
    if difference := _difference(read_serving_tokenizer(directory), theirs):
        raise AdapterError(
            f"adapter {name}: its own tokenizer differs from that of {artifact}: it has "
            f"{difference}",
            remedy="Export it on its own.",
        )


def _same_file(directory: Path, artifact: Path) -> bool:
    ours, theirs = directory / "tokenizer.json", artifact / "tokenizer.json"
    both = ours.is_file() and theirs.is_file()
    return both and ours.read_bytes() == theirs.read_bytes()


def _difference(tokenizer: Any, other: Any | None) -> str | None:
    """What tokens one tokenizer has that another numbers otherwise; None if there are none."""
    ours = numbers_of(tokenizer)
    theirs = {} if other is None else numbers_of(other)
    extra = dict(ours.items() - theirs.items())
    if extra:
        return named_tokens(extra)
    lacking = dict(theirs.items() - ours.items())
    return f"not {named_tokens(lacking)}" if lacking else None
