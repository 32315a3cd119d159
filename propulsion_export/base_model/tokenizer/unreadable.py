"""Say why a tokenizer cannot be read."""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from propulsion_export.base_model.config import settings_in
from propulsion_export.base_model.remote_code import AUTO_MAP, own_modules
from propulsion_export.base_model.tokenizer.files import (
    CONVERTED,
    TOKENIZER_CONFIG,
    class_called,
    class_names,
    required_files,
)
from propulsion_export.errors import (
    BaseModelError,
    PropulsionExportError,
    UnavailableError,
    first_line,
)

_SENTENCEPIECE_ENDINGS = (".model", ".spm")
# Whose name to install differs from the name to import.
_PACKAGES = {"google": "protobuf", "google.protobuf": "protobuf"}
_COPY_AGAIN = "Copy it again, or save the tokenizer again with its save_pretrained."


class OwnCodeError(BaseModelError):
    """A tokenizer is code of its own, which was not allowed to run."""


def why_unreadable(
    source: str, files: Mapping[str, Path], error: BaseException
) -> PropulsionExportError:
    """The error to raise where transformers could not load a tokenizer from these files."""
    if "trust_remote_code" in str(error):
        return needs_own_code(source)
    if packages := _packages(files, error):
        return needs_packages(source, packages)
    if problem := _protobuf_error(files):
        return UnavailableError(
            f"{source}: its SentencePiece model cannot be read by the protobuf and sentencepiece "
            f"installed here ({problem})",
            remedy="Run: pip install --upgrade protobuf 'sentencepiece<0.2.3'.",
        )
    reason = f"{type(error).__name__}: {first_line(error)}"
    if damaged := _damaged(files):
        return BaseModelError(*damaged, remedy=_COPY_AGAIN)
    settings = settings_in(source, TOKENIZER_CONFIG)
    names = class_names(source, settings)
    known = {name: found for name in names if (found := class_called(name)) is not None}
    for name, tokenizer_class in known.items():
        if missing := missing_files(tokenizer_class, files):
            return lacks_vocabulary(source, name, missing)
    if names and names[0] not in known and AUTO_MAP not in settings:
        return BaseModelError(
            f"{source}: names the tokenizer class {names[0]}, which the transformers installed "
            f"does not have ({reason})",
            remedy="Save the tokenizer as a fast one (tokenizer.json).",
        )
    return BaseModelError(
        f"{source}: its tokenizer ({', '.join(sorted(files))}) cannot be read ({reason})",
        remedy=_COPY_AGAIN,
    )


def needs_own_code(source: str) -> OwnCodeError:
    """The error where a tokenizer's own code is not allowed to run."""
    modules = own_modules(settings_in(source, TOKENIZER_CONFIG).get(AUTO_MAP))
    shown = ", ".join(modules) or "of another repository"
    return OwnCodeError(
        f"{source}: its tokenizer is code of its own ({shown}), which is not run unless that is "
        "allowed",
        remedy="Give --trust-remote-code where the command has it, or save the tokenizer as a fast "
        "one (tokenizer.json).",
    )


def needs_packages(source: str, packages: Iterable[str]) -> UnavailableError:
    """The error where packages that a tokenizer needs are not installed."""
    names = list(packages)
    return UnavailableError(
        f"{source}: its tokenizer needs {' and '.join(names)}, not installed here",
        remedy=f"Run: pip install {' '.join(names)}.",
    )


def lacks_vocabulary(source: str, class_name: str, missing: Iterable[str]) -> BaseModelError:
    """The error where a tokenizer's vocabulary is not among its files."""
    return BaseModelError(
        f"{source}: its tokenizer has no vocabulary: {class_name} reads it from "
        f"{' and '.join(missing)}, expected that or tokenizer.json",
        remedy="Copy the missing file into the base model's directory.",
    )


def missing_files(tokenizer_class: Any, files: Iterable[str]) -> list[str]:
    """The files that a class needs for its vocabulary and that are not there."""
    found = set(files)
    required = required_files(tokenizer_class)
    if _is_fast(tokenizer_class):
        whole = any(name.startswith("tokenizer") and _is_whole(name) for name in found)
        if whole or found & set(CONVERTED):
            return []
        required = required or ["tokenizer.json"]
    return [name for name in required if name not in found]


def _is_fast(tokenizer_class: Any) -> bool:
    """Whether a class of transformers reads tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    try:
        return issubclass(tokenizer_class, PreTrainedTokenizerFast)
    except ImportError:  # a stand-in for a package that is not installed
        return False


def _is_whole(name: str) -> bool:
    return name.endswith(".json") and name != TOKENIZER_CONFIG


def _packages(files: Mapping[str, Path], error: BaseException) -> list[str]:
    """The packages that are not installed and that the tokenizer needs, by their pip names."""
    # transformers takes any file of that kind for tiktoken's if sentencepiece is not installed.
    needed = ("sentencepiece", "google.protobuf") if _sentencepiece_files(files) else ()
    if absent := [name for name in needed if not _is_installed(name)]:
        return [_PACKAGES.get(name, name) for name in absent]
    if _sentencepiece_files(files):
        return []
    if isinstance(error, ImportError) and error.name:
        top = error.name.partition(".")[0]
        return [_PACKAGES.get(top, top)]
    named = re.findall(r"pip install ([\w-]+)|requires the (\w+) library", str(error))
    return list(dict.fromkeys("".join(groups).lower() for groups in named))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is not installed
        return False


def _sentencepiece_files(files: Mapping[str, Path]) -> list[Path]:
    """The SentencePiece models among the files of a tokenizer without a tokenizer.json."""
    if "tokenizer.json" in files:
        return []
    named = {name: path for name, path in files.items() if name != "tiktoken.model"}
    found = [path for name, path in named.items() if name.endswith(_SENTENCEPIECE_ENDINGS)]
    return [path for path in found if not _is_tiktoken(path)]


def _is_tiktoken(file: Path) -> bool:
    """Whether a file holds lines of a token in base64 and its rank."""
    with file.open("rb") as content:
        return re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", content.readline(4096)) is not None


def _protobuf_error(files: Mapping[str, Path]) -> str | None:
    """Why protobuf cannot read a SentencePiece model that is whole; None where that is not it."""
    models = _sentencepiece_files(files)
    if not models or any(_sentencepiece_error(path) for path in models):
        return None
    from google.protobuf.runtime_version import VersionError
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        import_protobuf()
    except (ImportError, VersionError, TypeError) as error:
        return first_line(error)
    return None


def _sentencepiece_error(file: Path) -> str | None:
    """Why a file is no SentencePiece model; None where it is one."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor().Load(str(file))
    except (RuntimeError, OSError) as error:
        return first_line(error)
    return None


def _damaged(files: Mapping[str, Path]) -> list[str]:
    """A finding for each file that is not what its name says."""
    findings = [
        f"{path}: is damaged ({problem})"
        for name, path in files.items()
        if name.endswith(".json") and (problem := _json_error(path)) is not None
    ]
    return findings + [
        f"{path}: is no SentencePiece model ({problem})"
        for path in _sentencepiece_files(files)
        if (problem := _sentencepiece_error(path)) is not None
    ]


def _json_error(file: Path) -> str | None:
    """Why a file is no JSON; None where it is."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return first_line(error)
    return None
