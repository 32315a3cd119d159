"""Mistakes in the weights of a graph or of a merged checkpoint."""

import re
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from mutation.mistakes import Family, Place, Places
from mutation.planted import Copy
from propulsion_export.adapters.scales import Array

WEIGHTS = Family("weights")
_TRANSPOSED = ".T"  # ends the name of a weight that the graph holds transposed
_WIDE = {"c_attn", "c_proj", "c_fc"}  # GPT-2's, which hold an input a row
_TABLES = {
    "tokens": r"(word_embeddings|embed_tokens|wte|shared)\.weight$",
    "positions": r"(position_embeddings|wpe|embed_positions)\.weight$",
    "types": r"token_type_embeddings\.weight$",
    "buckets": r"relative_attention_bias\.weight$",
}
_NORM = r"(norm|ln_\w+|layer_?norm\w*|LayerNorm)\.{}$"
_HEAD = r"(classifier|lm_head|score)\.{}(\.T)?$"
_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def named(pattern: str, *, ndim: int | None = None) -> Callable[[Copy], list[str]]:
    """The weights whose names match, found in a copy."""

    def find(copy: Copy) -> list[str]:
        return [
            key
            for key, values in copy.weights.items()
            if re.search(pattern, key, re.IGNORECASE) and ndim in (None, values.ndim)
        ]

    return find


def linear(copy: Copy) -> list[str]:
    """The matrices of layers: neither tables nor what has one dimension."""
    tables = "|".join(_TABLES.values())
    found = [
        key
        for key, values in copy.weights.items()
        if values.ndim == 2 and not re.search(tables, key) and min(values.shape) > 2
    ]
    return [key for key in found if ".weight" in key]


def channels(copy: Copy, key: str) -> int:
    """The axis of a layer's matrix that has an output channel."""
    name = key.removesuffix(_TRANSPOSED).split(".")[-2]
    held_by_input = name in _WIDE or ("h." in key and name in _WIDE)
    return int(key.endswith(_TRANSPOSED) != held_by_input)


def each(find: Callable[[Copy], list[str]]) -> Places:
    return lambda copy: [(key,) for key in find(copy)]


def each_channel(find: Callable[[Copy], list[str]]) -> Places:
    def places(copy: Copy) -> Iterator[Place]:
        for key in find(copy):
            width = copy.weights[key].shape[channels(copy, key)]
            yield from ((key, channel) for channel in (0, width // 2, width - 1))

    return places


def each_row(table: str, rows: Callable[[int], list[int]]) -> Places:
    def places(copy: Copy) -> Iterator[Place]:
        for key in named(_TABLES[table], ndim=2)(copy):
            yield from ((key, row) for row in rows(len(copy.weights[key])))

    return places


def pairs(find: Callable[[Copy], list[str]], partner: Callable[[str], str | None]) -> Places:
    """Places of two weights of one shape."""

    def places(copy: Copy) -> Iterator[Place]:
        weights = copy.weights
        for key in find(copy):
            other = partner(key)
            if other in weights and weights[other].shape == weights[key].shape:
                yield key, other

    return places


def change_(copy: Copy, key: str, change: Callable[[Array], Array]) -> None:
    """Replace a weight by a function of its values in float64."""
    copy.set_weight(key, change(copy.weights[key].astype(np.float64)))


def next_layer(key: str) -> str | None:
    found = _LAYER.search(key)
    if found is None or found[1] != "0":
        return None
    return f"{key[: found.start()]}1{key[found.end() :]}"


def _renamed(one: str, other: str) -> Callable[[str], str | None]:
    return lambda key: key.replace(one, other) if one in key else None


def _square(copy: Copy) -> list[str]:
    return [k for k in linear(copy) if copy.weights[k].shape[0] == copy.weights[k].shape[1]]


def _in_channel(copy: Copy, place: Place, change: Callable[[Array], Array | float]) -> None:
    key, channel = place

    def changed(values: Array) -> Array:
        view = values if channels(copy, key) == 0 else values.T
        view[channel] = change(view[channel])
        return values

    change_(copy, key, changed)


@WEIGHTS.sized("a channel of a weight off by", each_channel(linear), 0.001, 0.01, 0.1)
def channel_off(copy: Copy, place: Place, *, size: float) -> None:
    _in_channel(copy, place, lambda row: row * (1 + size))


@WEIGHTS.sized("a weight off by", each(linear), 0.001, 0.01, 0.1)
def weight_off(copy: Copy, place: Place, *, size: float) -> None:
    change_(copy, place[0], lambda values: values * (1 + size))


@WEIGHTS.kind("the sign of a weight's channel lost", each_channel(linear))
def sign_of_channel(copy: Copy, place: Place) -> None:
    _in_channel(copy, place, lambda row: -row)


@WEIGHTS.kind("a weight's channel lost", each_channel(linear))
def zero_channel(copy: Copy, place: Place) -> None:
    _in_channel(copy, place, lambda row: 0.0)


@WEIGHTS.kind("two channels of a weight exchanged", each(linear))
def exchanged_channels(copy: Copy, place: Place) -> None:
    axis = channels(copy, place[0])

    def exchanged(values: Array) -> Array:
        order = np.arange(values.shape[axis])
        order[[1, 2]] = order[[2, 1]]
        return values.take(order, axis)

    change_(copy, place[0], exchanged)


@WEIGHTS.kind("a weight shifted by one channel", each(linear))
def shifted(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: np.roll(values, 1, channels(copy, place[0])))


@WEIGHTS.kind("a square weight transposed", each(_square))
def transposed(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: values.T)


@WEIGHTS.kind("a single element of a weight wrong", each(linear))
def one_element(copy: Copy, place: Place) -> None:
    def wrong(values: Array) -> Array:
        values[-1, -1] += np.abs(values).max()
        return values

    change_(copy, place[0], wrong)


@WEIGHTS.kind("the second half of a weight lost", each(linear))
def half_lost(copy: Copy, place: Place) -> None:
    def cut(values: Array) -> Array:
        values.reshape(-1)[values.size // 2 :] = 0
        return values

    change_(copy, place[0], cut)


@WEIGHTS.kind("NaN in one element of a weight", each(linear))
def nan_in_weight(copy: Copy, place: Place) -> None:
    def spoilt(values: Array) -> Array:
        values[0, 0] = np.nan
        return values

    change_(copy, place[0], spoilt)


@WEIGHTS.kind("infinity in one element of a weight", each(linear))
def infinity_in_weight(copy: Copy, place: Place) -> None:
    def spoilt(values: Array) -> Array:
        values[-1, 0] = np.inf
        return values

    change_(copy, place[0], spoilt)


@WEIGHTS.kind("a weight rounded to float16", each(linear))
def through_float16(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: values.astype(np.float16).astype(np.float64))


@WEIGHTS.kind("a weight rounded to bfloat16", each(linear))
def through_bfloat16(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: values.astype(ml_dtypes.bfloat16).astype(np.float64))


@WEIGHTS.kind("a weight rounded to 8 bits", each(linear))
def through_int8(copy: Copy, place: Place) -> None:
    def rounded(values: Array) -> Array:
        step = np.abs(values).max() / 127
        return np.round(values / step) * step

    change_(copy, place[0], rounded)


@WEIGHTS.kind("a weight scaled as by dropout", each(linear))
def dropout(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: values / 0.9)


@WEIGHTS.kind("the weights of two layers exchanged", pairs(linear, next_layer))
def layers_exchanged(copy: Copy, place: Place) -> None:
    one, other = place
    values = copy.weights[one].copy(), copy.weights[other].copy()
    copy.set_weight(one, values[1])
    copy.set_weight(other, values[0])


@WEIGHTS.kind("a layer repeated", lambda copy: [("layer 0",)] if _first_layer(copy) else [])
def layer_repeated(copy: Copy, place: Place) -> None:
    for key, other in _first_layer(copy):
        copy.set_weight(other, copy.weights[key])


@WEIGHTS.kind(
    "the order of layers exchanged", lambda copy: [("all",)] if _first_layer(copy) else []
)
def layer_order(copy: Copy, place: Place) -> None:
    for pair in _first_layer(copy):
        layers_exchanged(copy, pair)


@WEIGHTS.kind(
    "the weights of query and value exchanged",
    pairs(linear, lambda key: key.replace("query", "value").replace("q_proj", "v_proj")
          if "query" in key or "q_proj" in key else None),
)  # fmt: skip
def query_and_value(copy: Copy, place: Place) -> None:
    layers_exchanged(copy, place)


@WEIGHTS.kind("the weights of key and value exchanged", pairs(linear, _renamed("k_proj", "v_proj")))
def key_and_value(copy: Copy, place: Place) -> None:
    layers_exchanged(copy, place)


@WEIGHTS.kind("the gate's and the up projection's weights exchanged",
              pairs(linear, _renamed("gate_proj", "up_proj")))  # fmt: skip
def gate_and_up(copy: Copy, place: Place) -> None:
    layers_exchanged(copy, place)


_BIASES = named(r"\.bias$", ndim=1)


def _is_norm(key: str) -> bool:
    return re.search(_NORM.format("(weight|bias)"), key, re.IGNORECASE) is not None


def _plain_biases(copy: Copy) -> list[str]:
    return [key for key in _BIASES(copy) if not _is_norm(key)]


@WEIGHTS.kind("a bias lost", each(_plain_biases))
def bias_lost(copy: Copy, place: Place) -> None:
    change_(copy, place[0], np.zeros_like)


@WEIGHTS.kind("a bias doubled", each(_plain_biases))
def bias_doubled(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: 2 * values)


@WEIGHTS.kind("a bias shifted by one channel", each(_plain_biases))
def bias_shifted(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: np.roll(values, 1))


@WEIGHTS.sized("a channel of a bias off by", each(_plain_biases), 0.01, 0.1)
def bias_off(copy: Copy, place: Place, *, size: float) -> None:
    def off(values: Array) -> Array:
        values[np.abs(values).argmax()] *= 1 + size
        return values

    change_(copy, place[0], off)


@WEIGHTS.kind("a norm's weight lost", each(named(_NORM.format("weight"), ndim=1)))
def norm_weight(copy: Copy, place: Place) -> None:
    change_(copy, place[0], np.ones_like)


@WEIGHTS.kind("one added to a norm's weight", each(named(_NORM.format("weight"), ndim=1)))
def norm_plus_one(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: 1 + values)


@WEIGHTS.sized("a channel of a norm's weight off by",
               each(named(_NORM.format("weight"), ndim=1)), 0.001, 0.01, 0.1)  # fmt: skip
def norm_channel(copy: Copy, place: Place, *, size: float) -> None:
    def off(values: Array) -> Array:
        values[3] *= 1 + size
        return values

    change_(copy, place[0], off)


@WEIGHTS.kind("a norm's bias lost", each(named(_NORM.format("bias"), ndim=1)))
def norm_bias(copy: Copy, place: Place) -> None:
    change_(copy, place[0], np.zeros_like)


def _rows_(copy: Copy, key: str, rows: slice | list[int], values: float | Array) -> None:
    def changed(table: Array) -> Array:
        table[rows] = values
        return table

    change_(copy, key, changed)


_SPECIAL = each_row("tokens", lambda rows: [0, 1, 2, 3, 4])


@WEIGHTS.kind("the embedding of a special token lost", _SPECIAL)
def special_row(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], [place[1]], 0.0)


@WEIGHTS.kind("the embeddings of all special tokens lost", each(named(_TABLES["tokens"], ndim=2)))
def special_rows(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], slice(0, 5), 0.0)


@WEIGHTS.kind("embeddings below a twentieth of the vocabulary wrong",
              each(named(_TABLES["tokens"], ndim=2)))  # fmt: skip
def first_rows(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda t: np.concatenate([t[: len(t) // 20][::-1], t[len(t) // 20 :]]))


@WEIGHTS.kind("the last embedding lost", each_row("tokens", lambda rows: [rows - 1]))
def last_row(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], [place[1]], 0.0)


@WEIGHTS.kind("one embedding wrong", each_row("tokens", lambda rows: [7, 31, rows // 2, rows - 3]))
def one_row(copy: Copy, place: Place) -> None:
    key, row = place
    _rows_(copy, key, [row], copy.weights[key][row - 1].astype(np.float64))


@WEIGHTS.kind("embeddings shifted by one", each(named(_TABLES["tokens"], ndim=2)))
def rows_shifted(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda table: np.roll(table, 1, 0))


@WEIGHTS.kind("embeddings scaled by the square root of the width",
              each(named(_TABLES["tokens"], ndim=2)))  # fmt: skip
def rows_scaled(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda table: table * table.shape[1] ** 0.5)


@WEIGHTS.kind("positions from a half on lost", each(named(_TABLES["positions"], ndim=2)))
def far_positions(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], slice(len(copy.weights[place[0]]) // 2, None), 0.0)


@WEIGHTS.kind("positions from 64 on lost", each(named(_TABLES["positions"], ndim=2)))
def positions_from_64(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], slice(64, None), 0.0)


@WEIGHTS.kind("the last position wrong", each_row("positions", lambda rows: [rows - 1]))
def last_position(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], [place[1]], 0.0)


@WEIGHTS.kind("positions shifted by one", each(named(_TABLES["positions"], ndim=2)))
def positions_shifted(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda table: np.roll(table, 1, 0))


@WEIGHTS.kind("one position wrong", each_row("positions", lambda rows: [2, 9, rows // 2 + 1]))
def one_position(copy: Copy, place: Place) -> None:
    key, row = place
    _rows_(copy, key, [row], copy.weights[key][row - 1].astype(np.float64))


@WEIGHTS.kind("token type 1 lost", each_row("types", lambda rows: [1] if rows > 1 else []))
def type_lost(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], [1], 0.0)


@WEIGHTS.kind("token types exchanged", each_row("types", lambda rows: [1] if rows > 1 else []))
def types_exchanged(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda table: table[::-1])


@WEIGHTS.kind("relative positions shifted by one bucket",
              each(named(_TABLES["buckets"], ndim=2)))  # fmt: skip
def buckets_shifted(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda table: np.roll(table, 1, 0))


@WEIGHTS.kind("the last bucket of relative positions lost",
              each_row("buckets", lambda rows: [rows // 2 - 1, rows - 1]))  # fmt: skip
def last_bucket(copy: Copy, place: Place) -> None:
    _rows_(copy, place[0], [place[1]], 0.0)


def _vectors_of_frequencies(copy: Copy) -> list[str]:
    """Falling vectors that begin with 1, or tables of cosines: they begin with a row of ones."""
    found = []
    for key, values in copy.weights.items():
        first = values.astype(np.float64).reshape(-1)
        falling = 4 <= first.size <= 64 and first[0] == 1 and (np.diff(first) < 0).all()
        table = values.ndim == 2 and (values[0] == 1).all() and not (values[1] == 1).all()
        if falling or table:
            found.append(key)
    return found


@WEIGHTS.sized("rotary frequencies off by", each(_vectors_of_frequencies), 0.001, 0.01, 0.1)
def frequencies(copy: Copy, place: Place, *, size: float) -> None:
    change_(copy, place[0], lambda values: values * (1 + size))


@WEIGHTS.kind("one rotary frequency wrong", each(_vectors_of_frequencies))
def one_frequency(copy: Copy, place: Place) -> None:
    def wrong(values: Array) -> Array:
        values[..., -1] *= 2
        return values

    change_(copy, place[0], wrong)


@WEIGHTS.kind("the head's bias lost", each(named(_HEAD.format("bias"))))
def head_bias(copy: Copy, place: Place) -> None:
    change_(copy, place[0], np.zeros_like)


@WEIGHTS.kind("the rows of the head shifted", each(named(_HEAD.format("weight"), ndim=2)))
def head_rows(copy: Copy, place: Place) -> None:
    change_(copy, place[0], lambda values: np.roll(values, 1, channels(copy, place[0])))


@WEIGHTS.sized("the head scaled by", each(named(_HEAD.format("weight"), ndim=2)), 0.001, 0.01, 0.1)
def head_scaled(copy: Copy, place: Place, *, size: float) -> None:
    change_(copy, place[0], lambda values: values * (1 + size))


def _tied(copy: Copy) -> list[Place]:
    tables = named(_TABLES["tokens"], ndim=2)(copy)
    heads = named(_HEAD.format("weight"), ndim=2)(copy)
    return [("no head of its own", *tables)] if tables and not heads else []


@WEIGHTS.kind("a tied head scaled with its embedding", _tied)
def tied_head(copy: Copy, place: Place) -> None:
    for key in place[1:]:
        change_(copy, key, lambda table: table * np.linspace(0.9, 1.1, table.shape[1]))


def _first_layer(copy: Copy) -> list[Place]:
    return list(pairs(lambda each: list(each.weights), next_layer)(copy))
