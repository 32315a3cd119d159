"""How large PyTorch's own error may be: as large as rounding explains, and no larger.

An output is the end of a residual stream. Every layer adds to the stream: attention, the block
behind it, and in a decoder with an encoder the attention to that. Each addition brings the rounding
of the sum and of the few products before it. The guaranteed bound adds these up: n additions, n
times the unit roundoff u. Roundings go up about as often as down, so that their sum grows like a
random walk: with overwhelming probability it stays below c * sqrt(n) * u (Higham and Mary, "A New
Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019). The bound is
relative to the size of the output. c holds what the analysis leaves open: how often a layer rounds,
how much it amplifies, and that the largest of many errors is compared. It is measured, see
CONSTANT.

A rotary embedding rotates by an angle of position times frequency, which is rounded to u times
itself: what enters every layer grows with the position. So the bound grows with the length of the
rows, in times of those that c was measured on.
"""

from functools import partial
from math import sqrt
from typing import Any

from propulsion_export.parity.comparison import FACTOR, UNIT_ROUNDOFF, Ceiling

# benchmarks/own_error.py measures PyTorch's error / (u * sqrt(n) * scale) in float32: at most 20 in
# tiny models, and 96 in SmolLM2 with a random adapter, which amplifies through 30 layers. This is
# about four times that.
CONSTANT = 400.0
LENGTH = 48  # tokens of the longest of the rows that CONSTANT was measured on
# A tolerance as large as the output's largest value decides nothing: zeros would pass.
LARGEST_SHARE = 1.0


def ceiling_of(config: Any, dtype: str, length: int = LENGTH) -> Ceiling:
    """The largest error of PyTorch itself that counts, for a model at a precision.

    Args:
        config: the model's configuration.
        dtype: the precision by name.
        length: how many tokens the longest row has.
    """
    additions = additions_of(config)
    return partial(largest_error, dtype=dtype, additions=additions, length=length)


def largest_error(scale: float, *, dtype: str, additions: int, length: int = LENGTH) -> float:
    """The largest error that rounding explains and that leaves a tolerance which decides something.

    Args:
        scale: the largest value of the output.
        dtype: the precision by name.
        additions: n, how often layers add to the residual stream.
        length: how many tokens the longest row has.
    """
    explained = CONSTANT * sqrt(additions) * UNIT_ROUNDOFF[dtype] * max(1.0, length / LENGTH)
    return min(explained, LARGEST_SHARE / FACTOR) * scale


def additions_of(config: Any) -> int:
    """How many times layers add to the residual stream, from a model's configuration; at least 1.

    Two for every layer of an encoder or decoder, three for those of a decoder with an encoder.
    """
    layers = int(getattr(config, "num_hidden_layers", None) or 1)
    if not getattr(config, "is_encoder_decoder", False):
        return 2 * layers
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    decoder = next(filter(None, (getattr(config, name, None) for name in names)), layers)
    return 2 * layers + 3 * int(decoder)
