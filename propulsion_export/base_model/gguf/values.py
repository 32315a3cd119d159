"""The numbers of a GGUF file's tensors, without quantisation."""

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.gguf.header import Header, type_name
from propulsion_export.errors import BaseModelError

Array = npt.NDArray[np.float32]


def read_values(header: Header, name: str) -> Array:
    """A tensor in float32, rows first, in memory of its own.

    Raises:
        BaseModelError: the package gguf has no dequantisation of its type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    place = header.tensors[name]
    kind = GGMLQuantizationType(place.kind)
    content = np.fromfile(header.file, np.uint8, place.size, offset=place.start)
    entries, size = GGML_QUANT_SIZES[kind]
    *rows, width = place.shape or (1,)
    if kind in _PLAIN:
        return content.view(_PLAIN[kind]).reshape(place.shape).astype(np.float32, copy=False)
    try:
        return dequantize(content.reshape(*rows, width // entries * size), kind)
    except NotImplementedError as error:
        raise BaseModelError(
            f"{header.file}: {name} is of the type {type_name(place.kind)}, which the package gguf "
            "cannot turn into numbers",
            remedy="Quantise the model to another type, such as Q4_K or Q8_0.",
        ) from error


def read_factors(header: Header, name: str) -> list[float]:
    """The numbers of a short tensor; none where the file has no such tensor."""
    if name not in header.tensors:
        return []
    return [float(str(number)) for number in read_values(header, name).ravel()]


_PLAIN = {0: np.float32, 1: np.float16, 28: np.float64}
