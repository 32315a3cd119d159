"""A model's tokenizer: read, copied, and texts as padded batches of tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.hub import copy_files
from propulsion_export.environment.quiet import quiet

Array = npt.NDArray[Any]


def text_inputs(
    names: tuple[str, ...], tokenizer: Any, texts: list[str], limit: int
) -> dict[str, Array]:
    """Tokenized texts as one padded int64 batch [len(texts), longest], cut at `limit` tokens."""
    return tensors_of(names, encode_texts(names, tokenizer, texts, limit=limit))


def tensors_of(names: tuple[str, ...], encoding: Any) -> dict[str, Array]:
    """The arrays of an encoding that a model reads, int64 [rows, length]."""
    return {name: encoding[name].astype(np.int64) for name in names}


def encode_texts(
    names: tuple[str, ...],
    tokenizer: Any,
    texts: list[str],
    *,
    limit: int,
    contexts: list[str] | None = None,
) -> Any:
    """What the tokenizer makes of texts, as transformers' BatchEncoding of one padded batch.

    Args:
        names: of the arrays wanted.
        tokenizer: of the model.
        texts: one a row.
        limit: in tokens; the longer of text and context is cut.
        contexts: a second text for each row, where the answer to the first is looked for.
    """
    return tokenizer(
        texts,
        contexts,
        truncation=True,
        max_length=limit,
        padding=True,
        # Not every tokenizer makes them by itself, and a graph requires what its model reads.
        return_token_type_ids="token_type_ids" in names,
        return_attention_mask=True,
        return_tensors="np",
    )


# Copied verbatim, so that any version of transformers reads what its own made.
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
    from transformers import AutoTokenizer

    directory = Path(source)
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None
