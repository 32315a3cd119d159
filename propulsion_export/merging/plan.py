"""Plan a merge: what becomes of each tensor that is written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.checkpoint import FLOATING, Checkpoint
from propulsion_export.base_model.tensor_files import DTYPES, Array, StoredTensor
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.changes import Change, Computed, Copied, Given, Scaled
from propulsion_export.merging.products import range_remedy
from propulsion_export.scaling.fold.jobs import Job

NAMES = {dtype: name for name, dtype in DTYPES.items()}  # the format's names of numpy's dtypes


@dataclass(frozen=True)
class Plan:
    """What a merge of one adapter writes.

    Attributes:
        adapter: its name.
        source: the base model's.
        changes: what becomes of each tensor, by the name that it is written under.
        keys: the name that each of them has in the base model's checkpoint, if it is stored there.
        changed: whether it is known before anything is computed that a weight changes.
    """

    adapter: str
    source: str
    changes: Mapping[str, Change]
    keys: Mapping[str, str]
    changed: bool

    @property
    def dtype(self) -> str:
        """The format's name of the coarsest floating-point dtype that is written."""
        return coarsest(map(written_dtype, self.changes.values()))


def plan_changes(
    checkpoint: Checkpoint, jobs: Sequence[Job], adapter: Adapter, dtype: str | None = None
) -> Plan:
    """Decide what becomes of each tensor; norms and biases are computed here.

    Args:
        checkpoint: the base model's.
        jobs: what is to be written.
        adapter: the adapter to fold in.
        dtype: the format's name of the dtype of all floating-point tensors written, such as
            `BF16`; None keeps each as stored, and gives the adapter's own modules the coarsest.

    Raises:
        BaseModelError: a tensor is quantised.
        AdapterError: a norm or a bias is too large for its dtype, or a scale has another shape.
    """
    stored = {job.name: checkpoint.tensors[job.part.key] for job in jobs if job.part is not None}
    _refuse_quantised(checkpoint, jobs)
    own = dtype or coarsest(tensor.dtype for tensor in stored.values())
    changes = {job.name: _change(job, stored.get(job.name), adapter, dtype, own) for job in jobs}
    given = {job.name: changes[job.name] for job in jobs if job.rule is not None}
    changed = any(
        isinstance(change, Given) and _differs(stored[name], change.values)
        for name, change in given.items()
    )
    keys = {job.name: job.part.key for job in jobs if job.part is not None}
    return Plan(adapter.name, checkpoint.source, changes, keys, changed or bool(adapter.modules))


def written_dtype(change: Change) -> str:
    """The format's name of the dtype that is written."""
    match change:
        case Copied(stored):
            return stored.dtype
        case Scaled(stored, _, dtype):
            return dtype or stored.dtype
        case Given(values):
            return NAMES[values.dtype]
        case Computed():
            return NAMES[change.dtype]


def written_shape(change: Change) -> tuple[int, ...]:
    """The shape that is written."""
    match change:
        case Given(values):
            return values.shape
        case Computed():
            return change.shape
    return change.stored.shape


def coarsest(dtypes: Iterable[str]) -> str:
    """The floating-point dtype of the lowest precision, among the format's names of dtypes."""
    floating = [dtype for dtype in dtypes if dtype in FLOATING]
    return min(floating, key=lambda dtype: DTYPES[dtype].itemsize, default="F32")


def _refuse_quantised(checkpoint: Checkpoint, jobs: Sequence[Job]) -> None:
    plain = (*FLOATING, "I64", "I32", "I16", "I8", "U8", "BOOL")
    for job in jobs:
        dtype = checkpoint.tensors[job.part.key].dtype if job.part is not None else "F32"
        expected = FLOATING if job.rule is not None else plain
        if dtype not in expected:
            raise BaseModelError(
                f"{checkpoint.source}: {job.name} is of the type {dtype}, expected one of "
                f"{', '.join(expected)}",
                remedy="Give the base model without quantisation.",
            )


def _change(
    job: Job, stored: StoredTensor | None, adapter: Adapter, dtype: str | None, own: str
) -> Change:
    """What becomes of a tensor; `own` is the dtype of what the adapter brings."""
    if stored is None:
        return Given(_narrowed(adapter.modules[job.parameter], own))
    wanted = dtype if stored.dtype in FLOATING else None
    match job.rule:
        case "norm" | "norm plus one" | "bias" | "trained bias":
            return Given(_vector(job, stored, adapter, wanted or stored.dtype))
        case None if wanted in (None, stored.dtype):
            return Copied(stored)
        case None:  # a product with 1 rounds once
            return Scaled(stored, np.ones((1,) * len(stored.shape)), wanted)
    return Scaled(stored, _factors(job, stored, adapter), wanted)


def _factors(job: Job, stored: StoredTensor, adapter: Adapter) -> Array:
    """The scale with the axes of the stored tensor."""
    scale, part = adapter.scales[job.path].values, job.part
    match job.rule:
        case "rows":
            factors = scale[:, None]
        case "columns":
            factors = scale[None, :]
        case "expert":
            assert part is not None
            rows = slice(part.first, part.first + stored.shape[0])
            factors = scale[part.expert, rows, None]
        case "experts' rows":
            factors = scale[:, :, None]
        case _:
            factors = scale[:, None, :]
    _check_shape(job, factors.shape, stored)
    return factors.astype(np.float64)


def _vector(job: Job, stored: StoredTensor, adapter: Adapter, dtype: str) -> Array:
    """The values of a norm's weight, or of the bias of a norm or a linear layer."""
    scale = adapter.scales[job.path].values
    values = stored.read().astype(np.float64)
    if job.rule in ("bias", "trained bias") and job.path in adapter.biases:
        values = np.asarray(adapter.biases[job.path], np.float64)
    if job.rule != "trained bias":
        _check_shape(job, scale.shape, stored)
        values = (1 + values) * scale - 1 if job.rule == "norm plus one" else values * scale
    narrow = _narrowed(values, dtype)
    if not np.isfinite(narrow).all():
        raise AdapterError(
            f"{job.name}: folded, it would hold values too large for {DTYPES[dtype]}",
            remedy=range_remedy(DTYPES[dtype]),
        )
    return narrow


def _narrowed(values: Array, dtype: str) -> Array:
    """Values of a floating-point dtype, rounded once."""
    if values.dtype == np.float64:
        return rounded(values, DTYPES[dtype])
    with np.errstate(over="ignore"):  # a head may be large: it is not held in float64
        return values.astype(DTYPES[dtype])


def _check_shape(job: Job, factors: tuple[int, ...], stored: StoredTensor) -> None:
    if len(factors) != len(stored.shape) or any(
        ours not in (1, theirs) for ours, theirs in zip(factors, stored.shape, strict=True)
    ):
        raise AdapterError(
            f"{job.name}: the adapter has values of shape {list(factors)}, the base model "
            f"{list(stored.shape)}",
            remedy="Was the adapter trained on this base model?",
        )


def _differs(stored: StoredTensor, values: Array) -> bool:
    before = rounded(stored.read().astype(np.float64), values.dtype)
    return not np.array_equal(before, values)
