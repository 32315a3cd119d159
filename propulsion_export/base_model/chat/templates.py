"""Where a chat template is: in a directory's files, or in a tokenizer that transformers loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propulsion_export.base_model.config import read_settings_file, settings_in
from propulsion_export.base_model.hub import locate
from propulsion_export.base_model.tokenizer.files import TEMPLATE_DIRECTORY, TOKENIZER_CONFIG
from propulsion_export.errors import ArtifactError, UsageError

TEMPLATE_FILE = "chat_template.jinja"
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


def read_template(directory: Path) -> str | None:
    """The chat template in a directory; None without one.

    Of several templates, it is the one named `default`.

    Raises:
        ArtifactError: a file is not what its name says.
    """
    for name in (TEMPLATE_FILE, f"{TEMPLATE_DIRECTORY}/{_DEFAULT}.jinja"):
        if (directory / name).is_file():
            return read_template_file(directory / name)
    settings = read_settings_file(directory / TOKENIZER_CONFIG)
    return choose_template(settings.get("chat_template"), with_tools=False)


def template_in(source: str) -> str | None:
    """The chat template of a checkpoint, by path or name; None without one."""
    for name in (TEMPLATE_FILE, f"{TEMPLATE_DIRECTORY}/{_DEFAULT}.jinja"):
        if (file := locate(source, name)) is not None:
            return read_template_file(file)
    settings = settings_in(source, TOKENIZER_CONFIG)
    return choose_template(settings.get("chat_template"), with_tools=False)


def no_template() -> UsageError:
    """What to raise where messages cannot be rendered."""
    return UsageError(
        "messages: the artifact has no chat template, expected one to render them with",
        remedy="Give texts, or put chat_template.jinja into the adapter's directory and export it "
        "again.",
    )


def read_template_file(file: Path) -> str:
    """The template in a file, as transformers reads it.

    Raises:
        ArtifactError: it cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: cannot be read as a chat template ({error})") from error


def choose_template(found: Any, *, with_tools: bool) -> str | None:
    """One template from a tokenizer's `chat_template`: a text, or several by name."""
    if isinstance(found, list):  # as tokenizer_config.json has several
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
    if isinstance(found, Mapping):
        chosen = found.get(_WITH_TOOLS) if with_tools else None
        found = chosen or found.get(_DEFAULT)
    return found if isinstance(found, str) and found else None


def write_template(directory: Path, template: str) -> None:
    """Make a template the one that transformers and `read_template` find in a directory."""
    # Not as text: line ends stay as they are.
    (directory / TEMPLATE_FILE).write_bytes(template.encode())
