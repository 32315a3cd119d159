"""A scale of the adapter on the tensors of a GGUF file, whose rows may lie in another order."""

from collections.abc import Iterator

import numpy as np

from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.gguf.entries import FileTensor
from propulsion_export.base_model.tensor_files import Array
from propulsion_export.errors import AdapterError
from propulsion_export.merging.gguf.written import Written

_EMBEDDINGS = "_embd.weight"


def on_axes(path: str, weight: FileTensor, scale: Scale, *, embedding: bool) -> Array:
    """A scale with as many axes as its weight has, to multiply that by.

    Raises:
        AdapterError: it has another number of channels.
    """
    shape, values = weight.shape, scale.values
    if values.ndim > 1:
        check_shape(path, values.shape, shape[:-1])
        return values[:, :, None]
    if len(shape) == 1 or embedding:
        if scale.side == "input":
            raise AdapterError(f"{path}: scales the input, which only linear layers can take")
        check_shape(path, values.shape, shape[-1:])
        return values.reshape((1,) * (len(shape) - 1) + (-1,))
    rows = (scale.side == "output") != weight.conversion.transposed
    check_shape(path, values.shape, (shape[0 if rows else 1],))
    return values[:, None] if rows else values[None, :]


def is_embedding(weight: FileTensor) -> bool:
    """Whether a weight has a row for each token or position."""
    return weight.names[0].endswith(_EMBEDDINGS)


def check_shape(path: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a scale of another shape.

    Raises:
        AdapterError: naming both.
    """
    if found != expected:
        raise AdapterError(f"{path}: has {list(found)} scales, the file {list(expected)} channels")


def spread(weight: FileTensor, factors: Array, channels: Array) -> Iterator[Written]:
    """The factors of a parameter on the tensors of the file, whose rows lie in another order."""
    tensors = [(name, weight.header.tensors[name]) for name in weight.names]
    columns = 0 if weight.conversion.transposed else -1
    if not weight.is_vector and factors.shape[columns] != 1:
        for name, place in tensors:
            shape = (1,) * (len(place.shape) - 1) + (-1,)
            yield Written(name, place, factors.reshape(shape), channels.reshape(shape))
        return
    numbers, arranged = weight.numbered_rows()
    if factors.shape != arranged.shape:  # one output, whose weight is a vector in the file
        factors, channels = (np.broadcast_to(each, arranged.shape) for each in (factors, channels))
    for (name, place), rows in zip(tensors, numbers, strict=True):
        yield Written(
            name,
            place,
            moved(factors, arranged)[rows],
            moved(channels, arranged)[rows],
        )


def moved(values: Array, arranged: Array) -> Array:
    """The values of a parameter's rows by the number that each row has in the file."""
    moved = np.empty(arranged.size, values.dtype)
    moved[arranged.ravel()] = values.ravel()
    return moved
