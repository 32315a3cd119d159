"""The rotary embedding that a GGUF file describes, as transformers' `rope_parameters`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# What llama.cpp takes where the file does not say.
_BASE, _LOCAL_BASE = 10_000.0, 10_000.0
_YARN = {"rope.scaling.yarn_beta_fast": ("beta_fast", 32.0)}
_YARN |= {"rope.scaling.yarn_beta_slow": ("beta_slow", 1.0)}
# Llama 3.1's own share of the context that each end of its ramp is at; only their ratios to the
# original context count.
_LOW, _HIGH = 1.0, 4.0
_CLOSE = 1e-5  # divisors are stored in float32

Take = Callable[..., Any]
Factors = Callable[[str], list[float]]


def rope_parameters(
    take: Take, factors: Factors, *, share: float | None, context: int
) -> dict[str, Any]:
    """The rotary embedding of a file.

    Args:
        take: gives the value of a metadata key, or a default.
        factors: gives the numbers of a tensor; none where the file has no such tensor.
        share: the part of each head that is rotated; None where it cannot be but the whole.
        context: the longest sequence.
    """
    found = {"rope_theta": take("rope.freq_base", _BASE), "rope_type": "default"}
    if share is not None:  # some classes have a default other than 1
        found["partial_rotary_factor"] = share
    kind = take("rope.scaling.type", "linear")
    factor = take("rope.scaling.factor", take("rope.scale_linear", 1.0))  # the name of 2023
    original = take("rope.scaling.original_context_length", None)
    if kind == "linear" and factor != 1.0:
        found |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        found |= {"rope_type": "yarn", "factor": factor}
        found["original_max_position_embeddings"] = original or round(context / factor)
        found |= {name: take(key, usual) for key, (name, usual) in _YARN.items()}
    if divisors := factors(FREQUENCIES):
        found |= _llama3(divisors, found["rope_theta"], context)
    if short := factors(SHORT):
        found |= _longrope(short, factors(LONG), take, original or context, context)
    return found


def local_rope_parameters(take: Take) -> dict[str, Any]:
    """The rotary embedding of layers with a sliding window, which is never scaled."""
    return {"rope_theta": take("rope.freq_base_swa", _LOCAL_BASE), "rope_type": "default"}


def _longrope(
    short: list[float], long: list[float], take: Take, original: int, context: int
) -> dict[str, Any]:
    found = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "factor": context / original,
    }
    attention = take("rope.scaling.attn_factor", 1.0)
    usual = math.sqrt(1 + math.log(context / original) / math.log(original))
    if not math.isclose(attention, usual, rel_tol=1e-6):
        found["attention_factor"] = attention
    return found


def _llama3(divisors: Sequence[float], base: float, context: int) -> dict[str, Any]:
    """The scaling of Llama 3.1, from what each frequency is divided by.

    transformers computes the divisors from four numbers; they are found from the divisors. Where
    no such numbers give them, they are written down one by one, as `longrope` can.
    """
    if all(divisor == 1 for divisor in divisors):
        return {}
    waves = [2 * math.pi * base ** (i / len(divisors)) for i in range(len(divisors))]
    factor = max(divisors)
    for original in _possible_contexts(divisors, waves, factor):
        given = [_divisor(wave, factor, original) for wave in waves]
        if all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(given, divisors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 6),
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    return {
        "rope_type": "longrope",
        "short_factor": list(divisors),
        "long_factor": list(divisors),
        "original_max_position_embeddings": context,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _possible_contexts(
    divisors: Sequence[float], waves: Sequence[float], factor: float
) -> list[int]:
    """The original contexts that the divisors between the two ends of the ramp speak for."""
    found = []
    for divisor, wave in zip(divisors, waves, strict=True):
        if 1 + _CLOSE < divisor < factor * (1 - _CLOSE):
            smooth = (1 / divisor - 1 / factor) / (1 - 1 / factor)
            found.append(round((smooth * (_HIGH - _LOW) + _LOW) * wave))
    # Without any between, all that keep the two ends apart give the same.
    ends = [wave * _LOW for d, wave in zip(divisors, waves, strict=True) if d >= factor]
    return found or [math.floor(end) for end in ends[:1]]


def _divisor(wave: float, factor: float, original: int) -> float:
    if wave < original / _HIGH:
        return 1.0
    if wave > original / _LOW:
        return factor
    smooth = (original / wave - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)
