"""Rotary embeddings whose frequencies depend on the longest row of a batch.

`longrope` (Phi-3) has one set of frequencies for sequences of up to
`original_max_position_embeddings` tokens and another for longer ones, `dynamic` another for every
length above `max_position_embeddings`. In a batch the longest row decides for all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SWITCHING = frozenset({"longrope", "su"})
# Transformers reads a scaling of Phi-3 under this name as longrope too.
_PHI3 = ("phi3", "phi4_multimodal")
# The switch of a Phi-3 whose configuration does not say.
_PHI3_SWITCH = 4096


def rope_switches(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The lengths, ascending, above which a model's rotary frequencies are others.

    Args:
        settings: the content of config.json, or a configuration as a dictionary.
    """
    found = {
        _switch(scaling, settings)
        for kind, scaling in _scalings(settings)
        if kind in _SWITCHING or (kind == "yarn" and settings.get("model_type") in _PHI3)
    }
    return tuple(sorted(number for number in found if number))


def side_of(length: int, switches: Sequence[int]) -> int:
    """How many of the switches a sequence of so many tokens is above."""
    return sum(length > switch for switch in switches)


def dynamic_limit(settings: Mapping[str, Any]) -> int | None:
    """The most tokens of a `dynamic` model before its frequencies change; None for other models."""
    if any("dynamic" in kind for kind, _ in _scalings(settings)):
        limit = _text(settings).get("max_position_embeddings")
        return limit if isinstance(limit, int) else None
    return None


def _switch(scaling: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    own, text = "original_max_position_embeddings", _text(settings)
    if settings.get("model_type") in _PHI3:
        return int(text.get(own) or scaling.get(own) or _PHI3_SWITCH)
    return int(scaling.get(own) or text.get(own) or text.get("max_position_embeddings") or 0)


def _scalings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The kind of each rotary scaling and its settings; some models have one for a layer type."""
    text = _text(settings)
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    nested = [one for one in found.values() if isinstance(one, Mapping)]
    for scaling in nested or [found]:
        yield str(scaling.get("rope_type") or scaling.get("type") or "default"), scaling


def _text(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model, which are nested where it also reads pictures."""
    rotary = settings.get("rope_parameters") or settings.get("rope_scaling")
    nested = settings.get("text_config")
    return nested if not rotary and isinstance(nested, Mapping) else settings
