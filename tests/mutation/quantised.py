"""Mistakes in quantised weights."""

from collections.abc import Callable, Iterator

import numpy as np

from mutation.mistakes import Family, Place
from mutation.planted import Copy
from propulsion_export.adapters.scales import Array

QUANTISED = Family("quantised", everywhere=True)


def _scales(copy: Copy) -> Iterator[Place]:
    if copy.manifest.quantization is not None:
        for file, model in copy.graphs.items():
            for node in model.graph:
                at = {"MatMulNBits": 2, "DequantizeLinear": 1}.get(node.op_type)
                if at is not None and node.inputs[at].const_value is not None:
                    yield (f"{file}:{node.inputs[at].name}",)


def _integers(copy: Copy) -> Iterator[Place]:
    if copy.manifest.quantization is not None:
        for file, model in copy.graphs.items():
            for node in model.graph:
                at = {"MatMulNBits": 1, "DequantizeLinear": 0}.get(node.op_type)
                if at is not None and node.inputs[at].const_value is not None:
                    yield (f"{file}:{node.inputs[at].name}",)


def _change_(copy: Copy, key: str, change: Callable[[Array], Array]) -> None:
    file, _, name = key.partition(":")
    copy.set_weight(
        key, change(copy.graphs[file].graph.initializers[name].const_value.numpy().copy())
    )


@QUANTISED.kind("quantisation scales of the neighbouring channel", _scales)
def neighbour(copy: Copy, place: Place) -> None:
    _change_(copy, place[0], lambda values: np.roll(values, 1, 0))


@QUANTISED.kind("quantisation scales of the neighbouring block", _scales)
def neighbouring_block(copy: Copy, place: Place) -> None:
    _change_(copy, place[0], lambda values: np.roll(values.reshape(-1), 1).reshape(values.shape))


@QUANTISED.sized("a quantisation scale off by", _scales, 0.001, 0.01, 0.1)
def scale_off(copy: Copy, place: Place, *, size: float) -> None:
    def off(values: Array) -> Array:
        values.reshape(-1)[0] *= 1 + size
        return values

    _change_(copy, place[0], off)


@QUANTISED.kind("the sign of a quantisation scale lost", _scales)
def sign(copy: Copy, place: Place) -> None:
    _change_(copy, place[0], lambda values: -values)


@QUANTISED.kind("quantised integers shifted by one row", _integers)
def rows(copy: Copy, place: Place) -> None:
    _change_(copy, place[0], lambda values: np.roll(values, 1, 0))


@QUANTISED.kind("a quantised integer off by one", _integers)
def integer(copy: Copy, place: Place) -> None:
    def off(values: Array) -> Array:
        flat = values.reshape(-1)
        flat[3] = flat[3] ^ 1 if values.dtype.kind == "u" else flat[3] - np.sign(flat[3] or 1)
        return values

    _change_(copy, place[0], off)


@QUANTISED.kind("nibbles exchanged", lambda copy: _integers(copy) if _is_packed(copy) else [])
def nibbles(copy: Copy, place: Place) -> None:
    _change_(copy, place[0], lambda values: (values >> 4) | (values << 4))


@QUANTISED.kind("quantised integers of half a tensor lost", _integers)
def half(copy: Copy, place: Place) -> None:
    def cut(values: Array) -> Array:
        values.reshape(-1)[values.size // 2 :] = 0
        return values

    _change_(copy, place[0], cut)


def _is_packed(copy: Copy) -> bool:
    entry = copy.manifest.quantization
    return entry is not None and entry.form == "matmulnbits" and entry.bits == 4
