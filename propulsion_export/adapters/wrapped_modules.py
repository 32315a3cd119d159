"""Modules that PEFT trains whole: under which names it writes their parameters."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.errors import AdapterError

# Parts of the names of a wrapped module's two copies, trained and frozen.
TRAINED, ORIGINAL = ".modules_to_save.", ".original_module."


def unwrapped(file: Path, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors by the names that they have in the model.

    With `save_embedding_layers`, PEFT writes a trained embedding under its name in the model and
    again under that of its wrapper, and the frozen one beside it.

    Args:
        file: where the tensors were read, for messages.
        tensors: by name in that file.

    Raises:
        AdapterError: the two trained copies differ.
    """
    kept = {key: value for key, value in tensors.items() if ORIGINAL not in key}
    wrapped = {key for key in kept if TRAINED in key}
    named = {key.replace(TRAINED, "."): kept[key] for key in wrapped}
    differing = [
        key for key, value in named.items() if key in kept and not np.array_equal(kept[key], value)
    ]
    if differing:
        raise AdapterError(
            *(f"{file}: {key} differs from its copy in modules_to_save" for key in differing),
            remedy="Save the adapter again with PEFT's save_pretrained.",
        )
    return {key: value for key, value in kept.items() if key not in wrapped} | named
