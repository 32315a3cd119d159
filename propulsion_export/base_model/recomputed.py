"""Which parameters transformers computes itself, so that a checkpoint need not have them."""

import re

from torch import nn


def recomputed_parameters(model: nn.Module) -> frozenset[str]:
    """Names of parameters and buffers that a checkpoint of this model may lack.

    transformers gives them the same values on every load: those its class never saves or does not
    miss, and tables of sinusoidal positions (Pegasus's, FSMT's), which older versions never saved.
    """
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    unmissed = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    names = {
        name
        for name in model.state_dict()
        if name in unsaved or any(re.search(pattern, name) for pattern in unmissed)
    }
    tables = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "Sinusoidal" in type(module).__name__
    }
    return frozenset(names | tables)
