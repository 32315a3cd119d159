"""Refuse tokens whose numbers are beyond a model's embedding."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt

from propulsion_export.base_model.config import settings_in
from propulsion_export.base_model.tokenizer.classes import NAMED
from propulsion_export.base_model.tokenizer.files import TOKENIZER_CONFIG
from propulsion_export.errors import BaseModelError, InvalidInputError, UsageError

# How a configuration names the number of embeddings; FSMT's vocab_size is that of its decoder.
# A test looks for more in the transformers installed.
_ROWS = ("src_vocab_size", "vocab_size", "n_words")
_SHOWN = 4  # tokens in a message


def embedding_rows(settings: Mapping[str, Any]) -> int | None:
    """How many tokens a model has embeddings for; None where its settings do not say.

    Args:
        settings: the content of config.json.
    """
    inner = settings.get("text_config")
    places = (settings, inner if isinstance(inner, dict) else {})
    found = (place.get(name) for place in places for name in _ROWS)
    return next((rows for rows in found if isinstance(rows, int) and rows > 0), None)


def check_token_ids(
    source: str,
    tokenizer: Any,
    settings: Mapping[str, Any],
    error: type[InvalidInputError] = BaseModelError,
) -> None:
    """Refuse a tokenizer that has tokens beyond the model's embedding.

    Tokens that stand for an image or a sound by a name of their own in tokenizer_config.json are
    left out: a processor writes them, and a model of texts may have none. `check_encoded` refuses
    them in a text.

    Args:
        source: directory or name of the checkpoint or artifact.
        tokenizer: its tokenizer, transformers' or a `FastTokenizer`.
        settings: the content of its config.json.
        error: the class of the error.

    Raises:
        InvalidInputError: naming the tokens and their numbers.
    """
    rows = embedding_rows(settings)
    if rows is None:
        return
    beyond = {token: number for token, number in numbers_of(tokenizer).items() if number >= rows}
    left_out = _for_other_media(source) if beyond else set()
    found = {token: number for token, number in beyond.items() if token not in left_out}
    if found:
        raise error(
            f"{source}: its tokenizer has {named_tokens(found)}, expected numbers below the "
            f"{rows} embeddings of the model",
            remedy="Resize the model's embeddings and save it with the tokenizer, or use the "
            "tokenizer that the model was trained with.",
        )


def check_encoded(ids: npt.NDArray[Any], rows: int | None) -> None:
    """Refuse texts whose tokens, [rows, length], are beyond the `rows` embeddings of a model.

    Raises:
        UsageError: naming the number of the token.
    """
    if rows is None or ids.size == 0 or int(ids.max()) < rows:
        return
    raise UsageError(
        f"the texts have the token {int(ids.max())}, expected numbers below the {rows} embeddings "
        "of the model"
    )


def numbers_of(tokenizer: Any) -> dict[str, int]:
    """The number of every token, added ones included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return dict(backend.get_vocab(with_added_tokens=True))
    return dict(tokenizer.get_vocab())


def named_tokens(tokens: Mapping[str, int]) -> str:
    """The first tokens with their numbers and how many more there are, as messages show them."""
    ordered = sorted(tokens.items(), key=lambda item: item[1])
    shown = ", ".join(f"{token!r} ({number})" for token, number in ordered[:_SHOWN])
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"the token{'s' if len(ordered) > 1 else ''} {shown}{more}"


def _for_other_media(source: str) -> set[str]:
    """Tokens that tokenizer_config.json names by a role of the model's own, such as image_token."""
    settings = settings_in(source, TOKENIZER_CONFIG)
    extra = settings.get("extra_special_tokens")
    roles = dict(extra) if isinstance(extra, dict) else {}
    roles |= {
        name: token
        for name, token in settings.items()
        if name.endswith("_token") and name not in NAMED
    }
    return set(_contents(roles.values()))


def _contents(tokens: Iterable[Any]) -> list[str]:
    return [
        str(token["content"] if isinstance(token, dict) else token)
        for token in tokens
        if isinstance(token, str) or (isinstance(token, dict) and "content" in token)
    ]
