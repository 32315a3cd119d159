"""Settings that differ from a base model's own files: decided in training, used by every stage."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from propulsion_export.base_model.config import read_settings_file
from propulsion_export.base_model.positions import BEHIND_PADDING
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.reading import read_tokenizer
from propulsion_export.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
SINGLE_LABEL: ProblemType = "single_label_classification"
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
_TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Settings:
    """What differs from the files of a base model, by name.

    Attributes:
        model: for config.json: `pad_token_id`, a token's number, and `problem_type`.
        tokenizer: for tokenizer_config.json: `pad_token`, and `add_prefix_space`, whether a text
            is read as if a space stood before it.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


def wrong_model_settings(found: Any) -> list[str]:
    """What is wrong with the field `model_settings` of an adapter; None is no setting."""
    fits = {
        "pad_token_id": lambda value: type(value) is int and value >= 0,
        "problem_type": lambda value: value in PROBLEM_TYPES,
    }
    return _wrong("model_settings", found, fits)


def wrong_tokenizer_settings(found: Any) -> list[str]:
    """What is wrong with the field `tokenizer_settings` of an adapter; None is no setting."""
    fits = {
        "pad_token": lambda value: isinstance(value, str) and value != "",
        "add_prefix_space": lambda value: isinstance(value, bool),
    }
    return _wrong("tokenizer_settings", found, fits)


def _wrong(name: str, found: Any, fits: Mapping[str, Any]) -> list[str]:
    if found is None:
        return []
    if not isinstance(found, dict):
        return [f"{name}: is {found!r}, expected settings by name"]
    return [
        f"{name}: {setting} is {value!r}, which is not possible"
        if setting in fits
        else f"{name}: has {setting!r}, expected only {', '.join(fits)}"
        for setting, value in found.items()
        if setting not in fits or not fits[setting](value)
    ]


def settings_for_batches(
    model: "PreTrainedModel", tokenizer: Any | None, task: str, source: str
) -> Settings:
    """What has to change so that a row of a batch gets the result that it gets alone.

    A tokenizer without a padding token gets the one of config.json, else its end token. A decoder
    that classifies texts reads the last token that is no padding, so that config.json must name
    the token that the tokenizer pads with.

    Args:
        model: the base model; its weights are not read.
        tokenizer: as transformers loads it; None if there is none.
        task: one of `TASKS`.
        source: the base model's name in messages.

    Raises:
        BaseModelError: the model needs a padding token and none can be it.
    """
    config, needed = model.config, reads_padding(model, task)
    own, changed = _own_padding(config), {}
    if tokenizer is None:
        number = _end_of(config) if own is None else own
    else:
        token = _padding_of(config, tokenizer)
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        changed = {"pad_token": token} if token and tokenizer.pad_token is None else {}
        _check_positions(config, tokenizer, number, source)
    known = number is not None and _is_token(config, number)
    if needed and not known:
        raise _no_padding(config, number, source)
    fills_up = TASKS[task].architecture == "encoder-decoder" and own is None
    if known and number != own and (needed or fills_up):
        return Settings({"pad_token_id": number}, changed)
    return Settings({}, changed)


def reads_padding(model: "PreTrainedModel", task: str) -> bool:
    """Whether the model's head looks for the padding token among the tokens of a text."""
    if TASKS[task].prediction != "class":
        return False
    try:
        return "pad_token_id" in inspect.getsource(type(model).forward)
    except OSError:  # code without a source
        return True


def _padding_of(config: "PretrainedConfig", tokenizer: Any) -> str | None:
    """The tokenizer's padding token, else the one of config.json, else the end token."""
    if tokenizer.pad_token is not None:
        return str(tokenizer.pad_token)
    own = _own_padding(config)
    named = None if own is None else tokenizer.convert_ids_to_tokens(own)
    found = named or tokenizer.eos_token
    return None if found is None else str(found)


def _end_of(config: "PretrainedConfig") -> int | None:
    end = getattr(config, "eos_token_id", None)
    return next(iter(end), None) if isinstance(end, list) else end


def _no_padding(config: "PretrainedConfig", number: int | None, source: str) -> BaseModelError:
    if number is None:
        found = "has neither a padding nor an end token, expected one to fill up a batch"
    else:
        rows = config.get_text_config().vocab_size
        found = f"pads with token {number}, expected one of the {rows} that its embedding has"
    return BaseModelError(
        f"{source}: {found}", remedy=f"Name a pad_token that it knows in its {_TOKENIZER_FILE}."
    )


def _check_positions(
    config: "PretrainedConfig", tokenizer: Any, number: int | None, source: str
) -> None:
    """Refuse padding on the left that a model would count as positions."""
    behind = config.model_type in BEHIND_PADDING and tokenizer.padding_side == "left"
    if behind and config.pad_token_id != number:
        raise BaseModelError(
            f"{source}: its tokenizer pads on the left with token {number}, expected "
            f"{config.pad_token_id}, which config.json counts positions from",
            remedy=f"Correct pad_token in its {_TOKENIZER_FILE}.",
        )


def _own_padding(config: "PretrainedConfig") -> int | None:
    """The padding token of a configuration; some say -1, or one that the embedding lacks."""
    number = getattr(config.get_text_config(), "pad_token_id", None)
    return number if isinstance(number, int) and _is_token(config, number) else None


def _is_token(config: "PretrainedConfig", number: int) -> bool:
    size: int = getattr(config.get_text_config(), "vocab_size", number + 1)
    return 0 <= number < size


def with_prefix_space(source: str, tokenizer: Any, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that reads a text as if a space stood before it, as byte-level ones read words.

    Returns:
        `tokenizer` itself if it does so already, or cannot, or would add one to each piece of a
        text.
    """
    if not tokenizer.is_fast or getattr(tokenizer, "add_prefix_space", None) is not False:
        return tokenizer
    if type(tokenizer.backend_tokenizer.pre_tokenizer).__name__ != "ByteLevel":
        return tokenizer
    spaced = read_tokenizer(source, trust_remote_code=trust_remote_code, add_prefix_space=True)
    assert spaced is not None
    same = spaced.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    return tokenizer if same else spaced


def problem_type_in(config: "PretrainedConfig") -> ProblemType | None:
    """What config.json says that the logits of a classifier mean, if it says that."""
    found: ProblemType | None = getattr(config, "problem_type", None)
    return found if found in PROBLEM_TYPES else None


def set_in_config_(config: "PretrainedConfig", settings: Settings) -> None:
    """Change a configuration in place, so that a model made of it uses the settings."""
    for name, value in settings.model.items():
        setattr(config, name, value)
        inner = config.get_text_config()
        if name == "pad_token_id" and inner is not config:
            setattr(inner, name, value)


def set_in_tokenizer_(tokenizer: Any, settings: Settings) -> None:
    """Change the padding token of a loaded tokenizer in place."""
    if "pad_token" in settings.tokenizer:
        tokenizer.pad_token = settings.tokenizer["pad_token"]


def read_tokenizer_settings(directory: Path) -> dict[str, Any]:
    """The settings in a tokenizer_config.json; empty where there is no such file.

    Raises:
        ArtifactError: it is no JSON object.
    """
    return read_settings_file(directory / _TOKENIZER_FILE)


def write_tokenizer_settings(directory: Path, settings: Settings) -> None:
    """Set them in the tokenizer_config.json of a directory that has a tokenizer's files."""
    if not settings.tokenizer:
        return
    content = {**read_tokenizer_settings(directory), **settings.tokenizer}
    file = directory / _TOKENIZER_FILE
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
