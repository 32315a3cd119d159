"""Mistakes in an adapter, on its way into an artifact of any mode."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from mutation.mistakes import Family, Place
from mutation.planted import Copy
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array, Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.layout import pack

ADAPTERS = Family("adapters")
Change = Callable[[Array], Array]


def read(copy: Copy, name: str = "one") -> Adapter:
    """The adapter as it was trained."""
    return Adapter.read(copy.artifact.list_adapters()[name].source, name)


def _paths(copy: Copy) -> Iterator[Place]:
    if not copy.artifact.list_adapters():
        return
    for path in read(copy).scales:
        yield ("one", path)


def _channels(copy: Copy) -> Iterator[Place]:
    for name, path in _paths(copy):
        width = read(copy).scales[path].values.size
        yield from ((name, path, channel) for channel in (0, width // 2, width - 1))


def _whole(copy: Copy) -> Iterator[Place]:
    yield from ((name,) for name in copy.artifact.list_adapters())


def _biases(copy: Copy) -> Iterator[Place]:
    for name in copy.artifact.list_adapters():
        yield from ((name, path) for path in read(copy, name).biases)


def _modules(copy: Copy) -> Iterator[Place]:
    for name in copy.artifact.list_adapters():
        yield from ((name, path) for path in read(copy, name).modules)


def _alike(copy: Copy, one: str, other: str) -> Iterator[Place]:
    """Pairs of modules of one width whose paths differ in one word."""
    for name, path in _paths(copy):
        partner = path.replace(one, other)
        scales = read(copy, name).scales
        if partner == path or partner not in scales:
            continue
        if scales[partner].values.shape == scales[path].values.shape:
            yield name, path, partner


def install_(copy: Copy, mistaken: Adapter) -> None:
    """Let the artifact have a mistaken adapter in place of its own, and say that it is its own."""
    mode, kind = copy.manifest.mode, copy.manifest.kind
    if mode != "folded":
        defaults = copy.packed("base")
        copy.set_packed(mistaken.name, pack(mistaken, copy.manifest.layout, defaults))
        return
    source = copy.directory.with_name("mistaken") / mistaken.name
    shutil.rmtree(source.parent, ignore_errors=True)
    source.mkdir(parents=True)
    mistaken.write(source)
    entry = copy.manifest.adapters[mistaken.name]
    shutil.rmtree(copy.directory)
    made = _merged(source, copy) if kind == "merged" else _folded(source, copy)
    right = replace(made.manifest.adapters[mistaken.name], digest=entry.digest, source=entry.source)
    copy.manifest = replace(made.manifest, adapters={mistaken.name: right})


def _merged(source: Path, copy: Copy) -> Artifact:
    from propulsion_export import merge

    return merge(source, copy.directory, dtype=copy.manifest.dtype, model=copy.manifest.base.source)


def _folded(source: Path, copy: Copy) -> Artifact:
    """Fold into the switchable artifact of the same base model, which lies beside."""
    from propulsion_export.pipeline.fold_onnx import fold_onnx

    (made,) = fold_onnx([source], copy.directory, from_artifact=switchable_beside(copy)).values()
    return made


def switchable_beside(copy: Copy) -> Path:
    """The switchable artifact of the same model and precision."""
    folder = copy.clean.with_name(copy.clean.name.removesuffix(".baseline"))
    return folder.with_name(folder.name.replace("_folded", "_switchable"))


def _scales_(copy: Copy, name: str, change: Mapping[str, Change]) -> None:
    right = read(copy, name)
    scales = {
        path: Scale(change[path](s.values.copy()), s.side) if path in change else s
        for path, s in right.scales.items()
    }
    install_(copy, replace(right, scales=scales))


def _every_(copy: Copy, name: str, change: Change) -> None:
    _scales_(copy, name, dict.fromkeys(read(copy, name).scales, change))


def _define(kind: str, change: Change) -> None:
    """A kind for one module's scale, and one for those of all modules."""

    @ADAPTERS.kind(f"a scale {kind}", _paths)
    def one_(copy: Copy, place: Place) -> None:
        _scales_(copy, place[0], {place[1]: change})

    @ADAPTERS.kind(f"all scales {kind}", _whole)
    def all_(copy: Copy, place: Place) -> None:
        _every_(copy, place[0], change)


def _permuted(values: Array) -> Array:
    return np.random.default_rng(3).permutation(values)


_define("permuted", _permuted)
_define("shifted by one channel", lambda values: np.roll(values, 1))
_define("in reverse", lambda values: values[::-1])
_define("of the degree above", lambda values: np.sign(values) * np.abs(values) ** (16 / 15))
_define("of degree 1", lambda values: np.sign(values) * np.abs(values) ** (1 / 15))
_define("without a sign", np.abs)
# As near to 1 as float32 has it: an adapter of ones cannot be folded.
_define("lost", lambda values: np.full_like(values, 1 + 2.0**-23))
_define("applied twice", np.square)
_define("inverted", lambda values: 1 / values)
_define("plus one", lambda values: values + 1)
_define("rounded to float16", lambda values: values.astype(np.float16).astype(np.float64))
_define("rounded to bfloat16", lambda values: values.astype(ml_dtypes.bfloat16).astype(np.float64))
_define("rounded to two decimals", lambda values: np.round(values, 2))
_define("clamped at 1", lambda values: np.clip(values, -1, 1))
_define(
    "with the first half twice",
    lambda values: np.resize(values[: max(1, values.size // 2)], values.shape),
)


@ADAPTERS.sized("a channel of a scale off by", _channels, 0.001, 0.01, 0.1)
def channel_off(copy: Copy, place: Place, *, size: float) -> None:
    name, path, channel = place

    def off(values: Array) -> Array:
        values[channel] *= 1 + size
        return values

    _scales_(copy, name, {path: off})


@ADAPTERS.sized("a scale off by", _paths, 0.001, 0.01, 0.1)
def scale_off(copy: Copy, place: Place, *, size: float) -> None:
    _scales_(copy, place[0], {place[1]: lambda values: values * (1 + size)})


@ADAPTERS.kind("a channel of a scale zero", _channels)
def channel_zero(copy: Copy, place: Place) -> None:
    name, path, channel = place

    def zero(values: Array) -> Array:
        values[channel] = 0
        return values

    _scales_(copy, name, {path: zero})


@ADAPTERS.kind("the scales of two layers exchanged", lambda copy: _alike(copy, ".0.", ".1."))
def layers_exchanged(copy: Copy, place: Place) -> None:
    _exchange_(copy, place)


@ADAPTERS.kind("the scales of query and value exchanged", lambda copy: [
    *_alike(copy, "query", "value"), *_alike(copy, "k_proj", "v_proj"),
])  # fmt: skip
def query_and_value(copy: Copy, place: Place) -> None:
    _exchange_(copy, place)


@ADAPTERS.kind("the scales of query and key exchanged", lambda copy: _alike(copy, "query", "key"))
def query_and_key(copy: Copy, place: Place) -> None:
    _exchange_(copy, place)


@ADAPTERS.kind("the scales of gate and up projection exchanged",
               lambda copy: _alike(copy, "gate_proj", "up_proj"))  # fmt: skip
def gate_and_up(copy: Copy, place: Place) -> None:
    _exchange_(copy, place)


def _exchange_(copy: Copy, place: Place) -> None:
    name, one, other = place
    scales = read(copy, name).scales
    _scales_(copy, name, {one: lambda _: scales[other].values, other: lambda _: scales[one].values})


@ADAPTERS.kind("another adapter's scales", _whole)
def other_adapter(copy: Copy, place: Place) -> None:
    right = read(copy, place[0])
    source = Path(copy.artifact.list_adapters()[place[0]].source)
    other = Adapter.read(source.with_name("two" if place[0] == "one" else "one"))
    install_(copy, replace(right, scales=other.scales))


@ADAPTERS.kind("a trained bias lost", _biases)
def bias_lost(copy: Copy, place: Place) -> None:
    right = read(copy, place[0])
    biases = {path: bias for path, bias in right.biases.items() if path != place[1]}
    install_(copy, replace(right, biases=biases))


@ADAPTERS.kind("a trained bias outside the product", _biases)
def bias_outside(copy: Copy, place: Place) -> None:
    right, path = read(copy, place[0]), place[1]
    outside = right.biases[path] / right.scales[path].values
    install_(copy, replace(right, biases={**right.biases, path: outside}))


@ADAPTERS.kind("a trained bias scaled twice", _biases)
def bias_twice(copy: Copy, place: Place) -> None:
    right, path = read(copy, place[0]), place[1]
    twice = right.biases[path] * right.scales[path].values
    install_(copy, replace(right, biases={**right.biases, path: twice}))


@ADAPTERS.kind("a trained head's rows shifted", _modules)
def head_rows(copy: Copy, place: Place) -> None:
    right, path = read(copy, place[0]), place[1]
    install_(
        copy, replace(right, modules={**right.modules, path: np.roll(right.modules[path], 1, 0)})
    )


@ADAPTERS.kind("a trained head lost", _modules)
def head_lost(copy: Copy, place: Place) -> None:
    right, path = read(copy, place[0]), place[1]
    zeros = np.zeros_like(right.modules[path])
    install_(copy, replace(right, modules={**right.modules, path: zeros}))


def _switchable(copy: Copy) -> list[Place]:
    return [("one", "two")] if copy.manifest.mode != "folded" else []


@ADAPTERS.kind("two adapters exchanged", _switchable, everywhere=True)
def adapters_exchanged(copy: Copy, place: Place) -> None:
    one, two = copy.packed("one"), copy.packed("two")
    copy.set_packed("one", two)
    copy.set_packed("two", one)


@ADAPTERS.kind("an adapter with the base model's values", _switchable, everywhere=True)
def adapter_is_base(copy: Copy, place: Place) -> None:
    copy.set_packed("two", copy.packed("base"))


@ADAPTERS.kind("the base model with an adapter's values", _switchable, everywhere=True)
def base_is_adapter(copy: Copy, place: Place) -> None:
    copy.set_packed("base", copy.packed("one"))


@ADAPTERS.kind("an adapter's packed values shifted by one", _switchable, everywhere=True)
def packed_shifted(copy: Copy, place: Place) -> None:
    copy.set_packed("one", {name: np.roll(v, 1) for name, v in copy.packed("one").items()})


@ADAPTERS.kind("NaN in an adapter's packed values", _switchable, everywhere=True)
def packed_nan(copy: Copy, place: Place) -> None:
    feeds = copy.packed("one")
    for values in feeds.values():
        values[5] = np.nan
    copy.set_packed("one", feeds)


@ADAPTERS.kind("the end of an adapter's packed values lost", _switchable, everywhere=True)
def packed_cut(copy: Copy, place: Place) -> None:
    feeds = copy.packed("one")
    for values in feeds.values():
        values[-max(1, values.size // 10) :] = 0
    copy.set_packed("one", feeds)


def _slots(copy: Copy) -> Iterator[Place]:
    yield from (("two", packed, slot.path) for packed, slot in copy.slots())


@ADAPTERS.kind("an adapter's slot left as it was before", _slots, everywhere=True)
def stale_slot(copy: Copy, place: Place) -> None:
    name, packed, path = place
    feeds, before = copy.packed(name), copy.packed("one")
    slot = next(s for p, s in copy.slots() if p == packed and s.path == path)
    here = slice(slot.offset, slot.offset + slot.length)
    feeds[packed][here] = before[packed][here]
    copy.set_packed(name, feeds)
