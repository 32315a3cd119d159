"""A model's tokenizer: read, copied, and texts as padded batches of tokens."""

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.gguf.files import small_files
from propulsion_export.base_model.hub import only_cached
from propulsion_export.base_model.model_inputs import ZERO_FOR_TEXTS
from propulsion_export.base_model.tokenizer.fast import read_fast_tokenizer
from propulsion_export.base_model.tokenizer.files import tokenizer_files
from propulsion_export.base_model.tokenizer.recorded import read_recorded_tokenizer
from propulsion_export.base_model.tokenizer.unreadable import (
    OwnCodeError,
    lacks_vocabulary,
    missing_files,
    needs_packages,
    why_unreadable,
)
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import ArtifactError, BaseModelError, UnavailableError

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


def copy_tokenizer(source: str, directory: Path, *, ask_classes: bool = True) -> None:
    """Copy the tokenizer's files, unchanged, from a checkpoint; there may be none.

    Unchanged, so that the version of transformers that wrote them can read them too. `ask_classes`
    is as for `tokenizer_files`.
    """
    for name, file in tokenizer_files(source, ask_classes=ask_classes).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, directory / name)


def read_tokenizer(
    source: str | Path, *, trust_remote_code: bool = False, add_prefix_space: bool | None = None
) -> Any | None:
    """The tokenizer of a checkpoint or artifact as transformers loads it; None when it has none.

    Args:
        source: directory or name.
        trust_remote_code: run a tokenizer's own code.
        add_prefix_space: replaces the setting of that name; None leaves it.

    Raises:
        BaseModelError: a file is damaged, the vocabulary is missing, its class is unknown, or its
            own code is not allowed to run.
        UnavailableError: it needs a package that is not installed.
    """
    source = str(source)
    files = tokenizer_files(source)
    if not files:
        return None
    from transformers import AutoTokenizer

    settings = {} if add_prefix_space is None else {"add_prefix_space": add_prefix_space}
    try:
        with quiet(), warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            tokenizer = AutoTokenizer.from_pretrained(
                small_files(source),
                trust_remote_code=trust_remote_code,
                local_files_only=only_cached(small_files(source)),
                **settings,
            )
    except Exception as error:  # whatever a tokenizer's class raises for what its files hold
        raise why_unreadable(source, files, error) from error
    # Without it, a Marian tokenizer leaves punctuation as it is.
    if packages := re.findall(r"Recommended: pip install (\w+)", " ".join(map(_text, noted))):
        raise needs_packages(source, packages)
    _check_vocabulary(source, tokenizer, files)
    return tokenizer


def tokenizer_to_record(source: str, *, trust_remote_code: bool) -> Any | None:
    """The tokenizer to record in an artifact.

    Returns:
        None where there is none, or this machine may or can not load it: then the artifact has its
        files alone, and what reads texts with it says what is missing.

    Raises:
        BaseModelError: a file is damaged, the vocabulary is missing, or its class is unknown.
    """
    try:
        return read_tokenizer(source, trust_remote_code=trust_remote_code)
    except (UnavailableError, OwnCodeError):
        return None


def _check_vocabulary(source: str, tokenizer: Any, files: Mapping[str, Path]) -> None:
    """Refuse the empty vocabulary that transformers builds where the file of one is missing."""
    kind = type(tokenizer)
    if not tokenizer.is_fast or not kind.__module__.startswith("transformers."):
        return
    if missing := missing_files(kind, files):
        raise lacks_vocabulary(source, kind.__name__, missing)


def _text(warning: warnings.WarningMessage) -> str:
    return str(warning.message)


def read_serving_tokenizer(directory: Path) -> Any | None:
    """The tokenizer of an artifact, without transformers where its files allow that.

    Returns:
        A `FastTokenizer`, from the record of the export or from the tokenizer's own files, else
        transformers' tokenizer; None without a tokenizer.

    Raises:
        ArtifactError: it cannot be read, with the reason.
        UnavailableError: a package that it needs is not installed.
    """
    fast = read_recorded_tokenizer(directory) or read_fast_tokenizer(directory)
    if fast is not None:
        return fast
    try:
        return read_tokenizer(directory)
    except BaseModelError as error:
        raise ArtifactError(*error.findings, remedy=error.remedy) from error
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UnavailableError(
            f"{directory}: only transformers loads its tokenizer, which is not installed",
            remedy="Run: pip install transformers.",
        ) from error
