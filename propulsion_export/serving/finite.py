"""Which outputs are no numbers: NaN or infinite, but for tokens that a model rules out."""

from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Tensors


def lost_scores(scores: Any) -> Any:
    """Whether scores of tokens, [..., vocabulary], choose none; bool [...].

    Minus infinity rules a token out. NaN, infinity, and a vocabulary that is ruled out as a whole
    leave no likeliest token.
    """
    return ~np.isfinite(np.asarray(scores).max(-1))


def are_lost(outputs: Tensors, *, of_tokens: bool) -> bool:
    """Whether an output of a row is NaN or infinite, which makes a prediction meaningless.

    Args:
        outputs: the row's outputs by name.
        of_tokens: whether they are scores of a vocabulary's tokens, see `lost_scores`.
    """
    if of_tokens:
        return any(bool(lost_scores(values).any()) for values in outputs.values())
    return not all(bool(np.isfinite(values).all()) for values in outputs.values())
