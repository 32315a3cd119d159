"""A model's tokenizer: read, copied, and texts as padded batches of tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.fast_tokenizer import read_fast_tokenizer
from propulsion_export.base_model.hub import copy_files
from propulsion_export.base_model.model_inputs import ZERO_FOR_TEXTS
from propulsion_export.base_model.recorded_tokenizer import read_recorded_tokenizer
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import UnavailableError

Array = npt.NDArray[Any]


def text_inputs(
    names: tuple[str, ...], tokenizer: Any, texts: list[str], limit: int
) -> dict[str, Array]:
    """Texts as one padded batch of tokens, int64 [len(texts), longest], cut at `limit` tokens."""
    return tensors_of(names, encode_texts(names, tokenizer, texts, limit=limit))


def tensors_of(names: tuple[str, ...], encoding: Any) -> dict[str, Array]:
    """The arrays of an encoding that a model reads, int64 [rows, length].

    A number that no text says, such as that of the task, is zero.
    """
    tokens = encoding["input_ids"]
    return {
        name: np.zeros_like(tokens, np.int64)
        if name in ZERO_FOR_TEXTS
        else encoding[name].astype(np.int64)
        for name in names
    }


def encode_texts(
    names: tuple[str, ...],
    tokenizer: Any,
    texts: list[str],
    *,
    limit: int,
    contexts: list[str] | None = None,
) -> Any:
    """Encode texts as one padded batch: arrays by name, and `encodings` of a fast tokenizer.

    Args:
        names: the arrays that the model reads.
        tokenizer: the model's tokenizer.
        texts: one text per row.
        limit: most tokens of a row; the longer of text and context is cut.
        contexts: a second text for each row, which holds the answer to the first.
    """
    return tokenizer(
        texts,
        contexts,
        truncation=True,
        max_length=limit,
        padding=True,
        # Not every tokenizer returns them by default, and a graph requires all its inputs.
        return_token_type_ids="token_type_ids" in names,
        return_attention_mask=True,
        return_tensors="np",
    )


# Copied verbatim, so that the version of transformers that wrote them can read them too.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def copy_tokenizer(source: str, directory: Path) -> None:
    """Copy the tokenizer's files, unchanged, from a checkpoint; there may be none."""
    copy_files(TOKENIZER_FILES, source, directory)


def read_tokenizer(source: str | Path) -> Any | None:
    """The tokenizer of a checkpoint or artifact, or None when it has none."""
    directory = Path(source)
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def read_serving_tokenizer(directory: Path) -> Any | None:
    """The tokenizer of an artifact, without transformers where its files allow that.

    Returns:
        A `FastTokenizer`, from the record of the export or from the tokenizer's own files, else
        transformers' tokenizer; None without a tokenizer.

    Raises:
        UnavailableError: only transformers can load it, and is not installed.
    """
    fast = read_recorded_tokenizer(directory) or read_fast_tokenizer(directory)
    if fast is not None:
        return fast
    try:
        return read_tokenizer(directory)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UnavailableError(
            f"{directory}: only transformers loads its tokenizer, which is not installed",
            remedy="Run: pip install transformers.",
        ) from error
