"""The tokens that begin, end and pad a text, read from a model's files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.errors import ArtifactError

# The first file that names a token counts, as in transformers' generate().
_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Token numbers; None, or empty, where the model has no such token.

    Attributes:
        begin: the token put before a text.
        end: the tokens that each end a generated text.
        pad: the token that fills up the shorter rows of a batch.
    """

    begin: int | None = None
    end: tuple[int, ...] = ()
    pad: int | None = None

    @classmethod
    def read(cls, directory: Path) -> "SpecialTokens":
        """Read the special tokens of a checkpoint or an artifact.

        Raises:
            ArtifactError: a file is no JSON object, or a token in it is no number.
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
    found: Any = next((content[key] for content in files if content.get(key) is not None), [])
    numbers = found if isinstance(found, list) else [found]
    if wrong := [number for number in numbers if type(number) is not int]:
        raise ArtifactError(f"{directory}: {key} is {wrong[0]!r}, expected a token's number")
    # Some configurations have -1 for a token that does not exist.
    return tuple(number for number in numbers if number >= 0)
