"""Classifiers that read the last end-of-sequence token of a text: BART, T5 and their relatives."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from propulsion_export.errors import DataError

_MODEL_TYPES = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")
_SHOWN = 40  # characters of a text in a message


def pools_at_eos(config: Any, task: str) -> bool:
    """Whether a model's class is read at the last end-of-sequence token of each text."""
    return getattr(config, "model_type", "") in _MODEL_TYPES and task == "text-classification"


def check_eos(ids: Any, config: Any, texts: Sequence[str] = ()) -> None:
    """Refuse rows of tokens [rows, length] without an end-of-sequence token, which have no class.

    Args:
        ids: the tokens.
        config: the model's configuration.
        texts: what the rows were before, to name them by; default: by their numbers.

    Raises:
        DataError: naming the rows.
    """
    without = np.flatnonzero(~(np.asarray(ids) == config.eos_token_id).any(axis=1))
    if len(without):
        names = [repr(texts[int(row)][:_SHOWN]) if texts else f"row {row}" for row in without]
        raise DataError(
            *(
                f"{name}: has no end-of-sequence token ({config.eos_token_id}), at which this "
                "classifier reads the class"
                for name in names
            ),
            remedy="Expected a tokenizer that ends every text with it.",
        )
