"""A tokenizer as transformers loads it, recorded when an artifact is made.

transformers builds the tokenizers of many classes anew (GPT-2's, Llama's, Qwen2's), so that
tokenizer.json alone does not determine what they compute. Serving loads this record without
transformers.
"""

import json
from pathlib import Path
from typing import Any

from propulsion_export.base_model.tokenizer.classes import NAMED
from propulsion_export.base_model.tokenizer.fast import FastTokenizer, read_fast_tokenizer
from propulsion_export.errors import ArtifactError

RECORD_FILE = "serving_tokenizer.json"
_SETTINGS = ("model_max_length", "padding_side", "truncation_side")


def record_tokenizer(tokenizer: Any | None, directory: Path) -> None:
    """Write the record if the tokenizer's own files do not suffice to load it.

    Args:
        tokenizer: as transformers loads it; None if there is none. One that is not a fast tokenizer
            is not recorded.
        directory: of the artifact, which has the tokenizer's own files.
    """
    if tokenizer is None or not tokenizer.is_fast or read_fast_tokenizer(directory) is not None:
        return
    special = {name: getattr(tokenizer, name, None) for name in NAMED}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    clean_up = bool(tokenizer.clean_up_tokenization_spaces)
    content = {
        "backend": backend,
        "special": {name: str(token) for name, token in special.items() if token is not None},
        "clean_up": clean_up and backend["model"]["type"] != "BPE",
        "model_input_names": list(tokenizer.model_input_names),
        **{name: getattr(tokenizer, name) for name in _SETTINGS},
    }
    (directory / RECORD_FILE).write_text(json.dumps(content), encoding="utf-8")


def read_recorded_tokenizer(directory: Path) -> FastTokenizer | None:
    """The recorded tokenizer of an artifact, or None without a record.

    Raises:
        ArtifactError: the record is damaged.
    """
    file = directory / RECORD_FILE
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        backend = Tokenizer.from_str(json.dumps(content["backend"]))
        settings = {name: content[name] for name in (*_SETTINGS, "clean_up")}
        special = dict(content["special"])
        names = content.get("model_input_names")  # records of earlier versions lack them
        if names is not None:
            settings["model_input_names"] = tuple(names)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ArtifactError(
            f"{file}: is no recorded tokenizer ({error})", remedy="Export again."
        ) from error
    backend.no_padding()
    backend.no_truncation()
    return FastTokenizer(backend, special, **settings)
