"""The small files of a model in a GGUF file, written out: what reads a checkpoint reads them.

config.json, generation_config.json, the tokenizer and the chat template. They lie in a temporary
directory as long as the process runs, so that only the weights need a way of their own.
"""

import atexit
import os
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

from propulsion_export.base_model.gguf.configuration import model_settings
from propulsion_export.base_model.gguf.header import Header, read_header
from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.base_model.gguf.tokenizer import build_tokenizer
from propulsion_export.base_model.gguf.values import read_factors
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import BaseModelError, first_line

# Tokens that end a turn or a message of a chat; a text is over with any of them.
_ENDS = ("eos", "eot", "eom")


def small_files(source: str) -> str:
    """Where a model's configuration and tokenizer are.

    Returns:
        `source` itself, or the directory with what its GGUF file says.

    Raises:
        BaseModelError: the GGUF file cannot be read, or says what transformers cannot do.
    """
    file = find_gguf(source)
    if file is None:
        return source
    status = file.stat()
    return _written(file.resolve(), status.st_size, status.st_mtime_ns)


@cache  # configurations and tokenizers name the directory they are from
def _written(file: Path, _: int, __: int) -> str:
    header = read_header(file)
    config = _config(header)
    tokenizer = build_tokenizer(header)
    directory = tempfile.mkdtemp(prefix="propulsion-export-gguf-")
    atexit.register(_remove, directory, os.getpid())
    with quiet():
        config.save_pretrained(directory)
        _generation(header).save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return directory


def _remove(directory: str, process: int) -> None:
    if os.getpid() == process:  # not a child of it
        shutil.rmtree(directory, ignore_errors=True)


def _config(header: Header) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = model_settings(header, partial(read_factors, header))
    kind = settings.pop("model_type")
    try:
        with quiet():
            config = AutoConfig.for_model(kind, **settings)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(
            f"{header.file}: its metadata is refused by transformers "
            f"({first_line(error.__cause__ or error)})"
        ) from error
    lost = [name for name, value in settings.items() if not _is_set(config, name, value)]
    if lost:
        raise BaseModelError(
            *(
                f"{header.file}: sets {name} to {settings[name]!r}, which the {kind} of "
                f"transformers makes {getattr(config, name, None)!r}"
                for name in lost
            )
        )
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return config


def _is_set(config: Any, name: str, value: Any) -> bool:
    """Whether a configuration has kept a setting; those of dictionaries are looked at each."""
    kept = getattr(config, name, None)
    if isinstance(value, dict) and isinstance(kept, dict):
        return kept.keys() >= value.keys() and value == {key: kept[key] for key in value}
    return kept == value or name == "dtype"


def _generation(header: Header) -> Any:
    from transformers import GenerationConfig

    found = {key: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in (*_ENDS, "bos")}
    ends = list(dict.fromkeys(found[key] for key in _ENDS if found[key] is not None))
    return GenerationConfig(
        bos_token_id=found["bos"],
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=header.metadata.get("tokenizer.ggml.padding_token_id"),
    )
