"""One tolerance formula, the same for every artifact, precision and output.

The oracle is the PyTorch base model with the adapter in float64. `e_ref` is the largest error that
PyTorch itself makes at the artifact's precision on the same inputs, against the oracle, over all of
them. A candidate may err by at most FACTOR times e_ref, and e_ref counts as no less than the unit
roundoff of the precision times the size of the output, so that a lucky zero does not condemn a
good artifact. What a runtime rounds beyond the precision, the inputs of quantised layers, is
measured on the base model, and counts like e_ref. Where e_ref is more than rounding explains, see
`own_error`, a candidate may err by what rounding explains, and not by a multiple of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.differences import rules_out
from propulsion_export.parity.pooling import PooledErrors, parts_of, scale_seen

# Measured on clean exports: the ratio of two runtimes' errors, pooled over 16 inputs, stays under
# 1.9; single inputs exceed 4 now and then, which is why errors are pooled.
FACTOR = 4.0
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# From the largest value of an output to the largest error of PyTorch itself that counts.
Ceiling = Callable[[float], float]
# Bins of the error histograms: decades of the absolute error, for the pictures.
DECADES = tuple(range(-16, 5))
_EDGES = tuple(10.0**decade for decade in DECADES[1:-1])


@dataclass(frozen=True)
class OutputErrors:
    """Errors of one output against the oracle, pooled over all inputs.

    Attributes:
        output: its name.
        error: largest absolute error of the candidate; NaN if it returned any.
        rms: root mean square of the candidate's errors; NaN if it returned any.
        reference_error: the same of PyTorch at that precision (e_ref).
        allowed: the largest `error` that passes.
        scale: largest absolute value of the oracle's output, minus infinities left out.
        worst: index of the worst element, batch first, with the oracle's and candidate's value.
        elements: how many numbers were compared.
        non_finite: how many of the errors are NaN or infinite.
        histogram: elements per decade of the candidate's error, see DECADES.
        reference_histogram: the same for PyTorch's error.
        explained: the largest `reference_error` that counts, see `own_error`; None: any.
    """

    output: str
    error: float
    rms: float
    reference_error: float
    allowed: float
    scale: float
    worst: str
    elements: int
    non_finite: int
    histogram: tuple[int, ...]
    reference_histogram: tuple[int, ...]
    explained: float | None = None

    @property
    def is_explained(self) -> bool:
        """Whether PyTorch's own error is one that rounding explains; false for NaN."""
        return self.explained is None or self.reference_error <= self.explained

    @property
    def passed(self) -> bool:
        """False for NaN too, so a NaN never passes."""
        return self.error <= self.allowed

    @property
    def margin(self) -> float:
        """The share of the allowed error that is left: 1 is perfect, below 0 has failed."""
        if self.allowed:
            return 1 - self.error / self.allowed
        return 1.0 if self.error == 0 else float("-inf")


def mismatch(oracle: Tensors, candidate: Tensors) -> str | None:
    """Say how names or shapes differ, or None; a missing output is a failure, not a warning."""
    if oracle.keys() != candidate.keys():
        return f"the oracle returns {sorted(oracle)}, the candidate {sorted(candidate)}"
    for name in sorted(oracle):
        if oracle[name].shape != candidate[name].shape:
            return (
                f"{name}: the oracle has shape {list(oracle[name].shape)}, the candidate "
                f"{list(candidate[name].shape)}"
            )
    return None


def compare(
    inputs: Sequence[Tensors],
    oracle: Sequence[Tensors],
    reference: Sequence[Tensors],
    candidate: Sequence[Tensors],
    dtype: str,
    ceiling: Ceiling | None = None,
) -> list[OutputErrors]:
    """Compare output by output; each sequence has one entry per batch of `inputs`.

    Names and shapes must agree, see `mismatch`. Positions that the attention mask hides do not
    count towards the error, but a NaN there fails all the same. Minus infinity in the same place on
    both sides is no error, see `differences`. A ceiling says how large an error of the reference
    counts; None: any.
    """
    return [
        _compare_output(name, inputs, oracle, reference, candidate, dtype, ceiling)
        for name in oracle[0]
    ]


def has_positions(name: str, inputs: Sequence[Tensors], oracle: Sequence[Tensors]) -> bool:
    """Whether an output's second dimension counts the positions of the input.

    It must match in every batch: the number of classes can equal one batch's length by chance. In
    an encoder-decoder it counts the decoder's tokens, which no mask hides.
    """
    return all(
        "attention_mask" in feeds
        and "decoder_input_ids" not in feeds
        and batch[name].shape[:2] == feeds["attention_mask"].shape
        for feeds, batch in zip(inputs, oracle, strict=True)
    )


def hidden_positions(
    name: str, inputs: Sequence[Tensors], oracle: Sequence[Tensors]
) -> list[Array]:
    """Batch by batch, True where the attention mask hides the position an element belongs to."""
    if not has_positions(name, inputs, oracle):
        return [np.broadcast_to(np.False_, batch[name].shape) for batch in oracle]
    hidden = []
    for feeds, batch in zip(inputs, oracle, strict=True):
        mask = feeds["attention_mask"] == 0
        column = mask.reshape(*mask.shape, *[1] * (batch[name].ndim - 2))
        hidden.append(np.broadcast_to(column, batch[name].shape))
    return hidden


def _compare_output(
    name: str,
    inputs: Sequence[Tensors],
    oracle: Sequence[Tensors],
    reference: Sequence[Tensors],
    candidate: Sequence[Tensors],
    dtype: str,
    ceiling: Ceiling | None,
) -> OutputErrors:
    hidden = hidden_positions(name, inputs, oracle)
    masked = [rules_out(batch[name]) for batch in oracle]
    errors, own = PooledErrors(_EDGES), PooledErrors(_EDGES)
    scale = 0.0
    for part in parts_of(name, hidden, oracle, reference, candidate):
        expected, itself, found = part.sides
        errors.add(part, found, expected, masked=masked[part.batch])
        own.add(part, itself, expected, masked=masked[part.batch])
        scale = float(np.maximum(scale, scale_seen(part, expected)))  # NaN if either is
    explained = None if ceiling is None else ceiling(scale)
    allowed = FACTOR * max(own.largest, UNIT_ROUNDOFF[dtype] * scale)
    if explained is not None and not own.largest <= explained:  # NaN too
        allowed = explained
    return OutputErrors(
        output=name,
        error=errors.largest,
        rms=errors.root_mean_square,
        reference_error=own.largest,
        allowed=allowed,
        scale=scale,
        worst=_worst(name, errors, oracle, candidate),
        elements=errors.elements,
        non_finite=errors.non_finite,
        histogram=errors.histogram,
        reference_histogram=own.histogram,
        explained=explained,
    )


def _worst(
    name: str, errors: PooledErrors, oracle: Sequence[Tensors], candidate: Sequence[Tensors]
) -> str:
    expected, found = (side[errors.batch][name] for side in (oracle, candidate))
    place = np.unravel_index(errors.place, expected.shape)
    where = ", ".join(map(str, (errors.batch, *map(int, place))))
    return f"[{where}]: oracle {expected[place]:.6g}, candidate {float(found[place]):.6g}"
