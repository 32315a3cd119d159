"""Which tokens begin, end and pad a text, as a model's own files say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.errors import ArtifactError

# The first that says something of a token is right, as in transformers' generate().
_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Token numbers; None, or no number at all, where the model has no such token.

    Attributes:
        begin: put before a text.
        end: each of them ends a text that is generated.
        pad: fills up the shorter rows of a batch.
    """

    begin: int | None = None
    end: tuple[int, ...] = ()
    pad: int | None = None

    @classmethod
    def read(cls, directory: Path) -> "SpecialTokens":
        """Those of a checkpoint or an artifact.

        Raises:
            ArtifactError: a file is no JSON object, or a token in it no number.
        """
        files = [_content(directory / name) for name in _FILES if (directory / name).is_file()]
        return cls(
            begin=next(iter(_numbers(files, "bos_token_id", directory)), None),
            end=_numbers(files, "eos_token_id", directory),
            pad=next(iter(_numbers(files, "pad_token_id", directory)), None),
        )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def _numbers(files: list[dict[str, Any]], key: str, directory: Path) -> tuple[int, ...]:
    told: Any = next((content[key] for content in files if content.get(key) is not None), [])
    numbers = told if isinstance(told, list) else [told]
    if wrong := [number for number in numbers if type(number) is not int]:
        raise ArtifactError(f"{directory}: {key} is {wrong[0]!r}, expected a token's number")
    # Some configurations say -1 for a token that there is not.
    return tuple(number for number in numbers if number >= 0)
