"""Mistakes in what a graph returns."""

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from mutation.editing import Editor, Make, after_node_
from mutation.mistakes import Family, Place, Places
from mutation.planted import Copy
from propulsion_export.artifacts.manifest import GraphEntry
from propulsion_export.artifacts.tensor_names import PRESENT

OUTPUTS = Family("outputs")


def _returning(*, cache: bool) -> Places:
    def places(copy: Copy) -> Iterator[Place]:
        for file, model in copy.graphs.items():
            for value in model.graph.outputs:
                if value.producer() and str(value.name).startswith(f"{PRESENT}.") == cache:
                    yield file, value.name

    return places


_ANSWERS, _CACHE = _returning(cache=False), _returning(cache=True)


def _output(copy: Copy, place: Place) -> tuple[ir.Graph, ir.Value]:
    file, name = place
    graph = copy.graphs[file].graph
    return graph, next(value for value in graph.outputs if value.name == name)


def _define(name: str, places: Places, make: Make) -> None:
    @OUTPUTS.kind(name, places)
    def plant_(copy: Copy, place: Place) -> None:
        after_node_(*_output(copy, place), make)


def _in_last_row(value_of: float) -> Make:
    def make(editor: Editor, value: ir.Value) -> ir.Value:
        shape = editor.op("Shape", value, start=0, end=1)
        last = editor.op("Equal", editor.rows(value), editor.op("Sub", shape, editor.number([1])))
        rank = editor.op("Size", editor.op("Shape", value))
        ones = editor.op(
            "Expand",
            editor.number(1),
            editor.op("Unsqueeze", editor.op("Sub", rank, editor.number(1)), editor.number([0])),
        )
        column = editor.op("Reshape", last, editor.op("Concat", shape, ones, axis=0))
        return editor.op("Where", column, editor.like(value_of, value), value)

    return make


def _rolled(axis: int) -> Make:
    def make(editor: Editor, value: ir.Value) -> ir.Value:
        at = editor.number([axis])
        last = editor.op("Slice", value, editor.number([-1]), editor.number([2**31 - 1]), at)
        rest = editor.op("Slice", value, editor.number([0]), editor.number([-1]), at)
        return editor.op("Concat", last, rest, axis=axis)

    return make


def _last_lost(axis: int) -> Make:
    def make(editor: Editor, value: ir.Value) -> ir.Value:
        at = editor.number([axis])
        last = editor.op("Slice", value, editor.number([-1]), editor.number([2**31 - 1]), at)
        rest = editor.op("Slice", value, editor.number([0]), editor.number([-1]), at)
        return editor.op("Concat", rest, editor.op("Mul", last, editor.like(0, value)), axis=axis)

    return make


def _capped(editor: Editor, value: ir.Value) -> ir.Value:
    cap = editor.like(30, value)
    return editor.op("Mul", editor.op("Tanh", editor.op("Div", value, cap)), cap)


def _sized(name: str, places: Places, *sizes: float) -> None:
    @OUTPUTS.sized(name, places, *sizes)
    def plant_(copy: Copy, place: Place, *, size: float) -> None:
        after_node_(*_output(copy, place), lambda e, x: e.op("Mul", x, e.like(1 + size, x)))


_sized("an output scaled by", _ANSWERS, 0.001, 0.01, 0.1)
_define("NaN in the last row of an output", _ANSWERS, _in_last_row(float("nan")))
_define("infinity in the last row of an output", _ANSWERS, _in_last_row(float("inf")))
_define("the last row of an output lost", _ANSWERS, _in_last_row(0.0))
_define("an output's rows shifted", _ANSWERS, _rolled(0))
_define("an output's classes shifted", _ANSWERS, _rolled(-1))
_define("an output's last class lost", _ANSWERS, _last_lost(-1))
_define(
    "an output clipped at 3", _ANSWERS, lambda e, x: e.op("Clip", x, e.like(-3, x), e.like(3, x))
)
_define("an output capped softly at 30", _ANSWERS, _capped)
_define("an output rounded to float16", _ANSWERS, lambda e, x: e.through(x, "FLOAT16"))
_define("an output rounded to bfloat16", _ANSWERS, lambda e, x: e.through(x, "BFLOAT16"))
_define("an output rounded to float16, then float32", _ANSWERS,
        lambda e, x: e.cast(e.cast(e.cast(x, "FLOAT16"), "FLOAT"), e.type_of(x)))  # fmt: skip
_define("an output as probabilities", _ANSWERS, lambda e, x: e.op("Softmax", x, axis=-1))
_define("an output as log probabilities", _ANSWERS, lambda e, x: e.op("LogSoftmax", x, axis=-1))
_define("an output's positions shifted", _ANSWERS, lambda e, x: _rolled(1)(e, x))
_define("an output transposed", _ANSWERS,
        lambda e, x: e.op("Transpose", x, perm=[1, 0, *range(2, len(x.shape or ()))]))  # fmt: skip
_define("the cache returned rolled by one", _CACHE, _rolled(2))
_define("the newest entry of the cache lost", _CACHE, _last_lost(2))
_define("the heads of the cache shifted", _CACHE, _rolled(1))
_define("the cache returned scaled by 1 %", _CACHE, lambda e, x: e.op("Mul", x, e.like(1.01, x)))
_define("the cache returned in bfloat16", _CACHE, lambda e, x: e.through(x, "BFLOAT16"))


@OUTPUTS.kind("an output renamed, in the manifest too", _ANSWERS)
def renamed(copy: Copy, place: Place) -> None:
    file, name = place
    _, value = _output(copy, place)
    value.name = f"{name}_1"
    _declare_(copy, file, lambda outputs: tuple(
        replace(each, name=f"{name}_1") if each.name == name else each for each in outputs
    ))  # fmt: skip


@OUTPUTS.kind("an output renamed", _ANSWERS)
def renamed_in_graph(copy: Copy, place: Place) -> None:
    _output(copy, place)[1].name = f"{place[1]}_1"


@OUTPUTS.kind("an output missing, in the manifest too", _CACHE)
def missing(copy: Copy, place: Place) -> None:
    file, name = place
    graph, value = _output(copy, place)
    graph.outputs[:] = [each for each in graph.outputs if each is not value]
    _declare_(copy, file, lambda outputs: tuple(o for o in outputs if o.name != name))


def _declare_(copy: Copy, file: str, change) -> None:
    manifest = copy.manifest
    if not manifest.graphs:
        copy.manifest = replace(manifest, outputs=change(manifest.outputs))
        return
    entry = manifest.graphs[file]
    changed = GraphEntry(entry.inputs, change(entry.outputs))
    copy.manifest = replace(manifest, graphs={**manifest.graphs, file: changed})
