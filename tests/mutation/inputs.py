"""Mistakes in what a graph reads: ids, masks, types, positions, caches, rows, adapters."""

from collections.abc import Iterator

import onnx_ir as ir

from mutation.editing import Editor, Make, after_input_
from mutation.mistakes import Family, Place, Places
from mutation.planted import Copy
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, PACKED_INPUTS, PAST

INPUTS = Family("inputs")
_IDS = ("input_ids", "decoder_input_ids")
_MASKS = ("attention_mask", "encoder_attention_mask")


def reading(*names: str, starts: str | None = None) -> Places:
    """The inputs of these names, by file."""

    def places(copy: Copy) -> Iterator[Place]:
        for file, model in copy.graphs.items():
            for value in model.graph.inputs:
                name = str(value.name)
                if value.uses() and (name in names or (starts and name.startswith(starts))):
                    yield file, name

    return places


def _input(copy: Copy, place: Place) -> tuple[ir.Graph, ir.Value]:
    file, name = place
    graph = copy.graphs[file].graph
    return graph, next(value for value in graph.inputs if value.name == name)


_CACHE = reading(starts=f"{PAST}.")
_PACKED, _BANK, _ADAPTER_IDS = reading(*PACKED_INPUTS), reading(BANK_INPUT), reading(IDS_INPUT)
_IN_SOME_MODES = (_PACKED, _BANK, _ADAPTER_IDS)


def _define(name: str, places: Places, make: Make) -> None:
    @INPUTS.kind(name, places, everywhere=places in _IN_SOME_MODES)
    def plant_(copy: Copy, place: Place) -> None:
        after_input_(*_input(copy, place), make)


def _where(editor: Editor, chosen: ir.Value, one: ir.Value, other: ir.Value) -> ir.Value:
    return editor.op("Where", chosen, one, other)


def _rows_from(start: int) -> Make:
    """Rows from `start` on become copies of the row before it."""

    def make(editor: Editor, value: ir.Value) -> ir.Value:
        rows = editor.op("Min", editor.rows(value), editor.number(start - 1))
        return editor.op("Gather", value, rows, axis=0)

    return make


def _columns_from(start: int) -> Make:
    def make(editor: Editor, value: ir.Value) -> ir.Value:
        beyond = editor.op("GreaterOrEqual", editor.columns(value), editor.number(start))
        return _where(editor, beyond, editor.like(1, value), value)

    return make


def _changed_from(start: int, number: int, *, rows: int = 0) -> Make:
    """The numbers from a column on, in the rows from `rows` on, are another."""

    def make(editor: Editor, value: ir.Value) -> ir.Value:
        far = editor.op("GreaterOrEqual", editor.columns(value), editor.number(start))
        behind = editor.op("GreaterOrEqual", editor.rows(value), editor.number(rows))
        chosen = editor.op("And", far, editor.op("Unsqueeze", behind, editor.number([1])))
        return _where(editor, chosen, editor.like(number, value), value)

    return make


def _masks_beside_ids(copy: Copy) -> Iterator[Place]:
    """Masks of the tokens that a graph reads, without those in a cache."""
    for file, name in reading("attention_mask")(copy):
        names = {str(value.name) for value in copy.graphs[file].graph.inputs}
        if "input_ids" in names and not any(each.startswith(f"{PAST}.") for each in names):
            yield file, name


def _padding_hidden(editor: Editor, value: ir.Value) -> ir.Value:
    ids = next(each for each in editor.graph.inputs if each.name == "input_ids")
    padding = editor.op("Equal", ids, editor.number(0))
    return _where(editor, padding, editor.like(0, value), value)


def _token(one: int, other: int) -> Make:
    def make(editor: Editor, value: ir.Value) -> ir.Value:
        same = editor.op("Equal", value, editor.number(one))
        return _where(editor, same, editor.number(other), value)

    return make


def _clamped(most: int) -> Make:
    return lambda editor, value: editor.op("Min", value, editor.number(most))


def _rolled(editor: Editor, value: ir.Value, axis: int) -> ir.Value:
    """The last along an axis first."""
    ends = editor.number([-1]), editor.number([2**31 - 1])
    last = editor.op("Slice", value, *ends, editor.number([axis]))
    rest = editor.op("Slice", value, editor.number([0]), editor.number([-1]), editor.number([axis]))
    return editor.op("Concat", last, rest, axis=axis)


def _last_row_inverted(editor: Editor, value: ir.Value) -> ir.Value:
    shape = editor.op("Shape", value, start=0, end=1)
    last = editor.op("Equal", editor.rows(value), editor.op("Sub", shape, editor.number([1])))
    column = editor.op("Unsqueeze", last, editor.number([1]))
    return _where(editor, column, editor.op("Sub", editor.number(1), value), value)


def _first_column_hidden(editor: Editor, value: ir.Value) -> ir.Value:
    first = editor.op("Equal", editor.columns(value), editor.number(0))
    return _where(editor, first, editor.number(0), value)


def _zeros(editor: Editor, value: ir.Value) -> ir.Value:
    return editor.op("Mul", value, editor.like(0, value))


def _own_positions(editor: Editor, value: ir.Value) -> ir.Value:
    """0, 1, 2, … in every row, whatever is given."""
    return editor.op("Add", _zeros(editor, value), editor.columns(value))


def _first_row_for_all(editor: Editor, value: ir.Value) -> ir.Value:
    first = editor.op("Gather", value, editor.number(0), axis=0)
    return editor.op("Add", _zeros(editor, value), first)


_define(
    "ids off by one",
    reading(*_IDS),
    lambda e, x: e.op("Mod", e.op("Add", x, e.number(1)), e.number(100)),
)
_define("ids wrapped at 64", reading(*_IDS), lambda e, x: e.op("Mod", x, e.number(64)))
_define("ids cast to 8 bits", reading(*_IDS), lambda e, x: e.through(x, "INT8"))
_define("ids cast to bfloat16", reading(*_IDS), lambda e, x: e.through(x, "BFLOAT16"))
_define("ids clamped at 98", reading(*_IDS), _clamped(98))
_define("the token [SEP] read as [UNK]", reading(*_IDS), _token(3, 1))
_define("the token [CLS] read as [UNK]", reading(*_IDS), _token(2, 1))
_define("the token [MASK] read as [UNK]", reading(*_IDS), _token(4, 1))
_define("tokens from the 32nd on not read", reading(*_IDS), _columns_from(31))
_define("tokens from the 64th on not read", reading(*_IDS), _columns_from(63))
_define("the mask not read", reading(*_MASKS), lambda e, x: e.op("Max", x, e.number(1)))
_define("the mask of the last row inverted", reading(*_MASKS), _last_row_inverted)
for _start in (24, 60):
    _define(
        f"the mask not read from column {_start} on", reading(*_MASKS), _changed_from(_start, 1)
    )
    _define(
        f"rows behind the first not read from column {_start} on",
        reading(*_IDS),
        _changed_from(_start, 9, rows=1),
    )
_define("padding tokens hidden that the mask shows", _masks_beside_ids, _padding_hidden)
_define("token types from column 20 on lost", reading("token_type_ids"), _changed_from(20, 0))
_define("the first position always hidden", reading(*_MASKS), _first_column_hidden)
_define("the mask shifted by one", reading(*_MASKS), lambda e, x: _rolled(e, x, 1))
_define("the mask's rows shifted by one", reading(*_MASKS), lambda e, x: _rolled(e, x, 0))
_define("token types not read", reading("token_type_ids"), _zeros)
_define("token types inverted", reading("token_type_ids"), lambda e, x: e.op("Sub", e.number(1), x))
_define("positions off by one", reading("position_ids"), lambda e, x: e.op("Add", x, e.number(1)))
_define("positions clamped at 100", reading("position_ids"), _clamped(100))
_define("positions clamped at 40", reading("position_ids"), _clamped(40))
_define(
    "positions beginning again at 64",
    reading("position_ids"),
    lambda e, x: e.op("Mod", x, e.number(64)),
)
_define("positions not read", reading("position_ids"), _own_positions)
for _count in (2, 4, 8, 32):
    _define(f"rows beyond {_count} copied", reading(*_IDS), _rows_from(_count))
    _define(f"masks of rows beyond {_count} copied", reading(*_MASKS), _rows_from(_count))
_define("rows shifted by one", reading(*_IDS), lambda e, x: _rolled(e, x, 0))
_define(
    "an encoder's output scaled",
    reading("encoder_hidden_states"),
    lambda e, x: e.op("Mul", x, e.like(1.01, x)),
)
_define(
    "an encoder's output of the row before",
    reading("encoder_hidden_states"),
    lambda e, x: _rolled(e, x, 0),
)

_define("the cache not read", _CACHE, _zeros)
_define("the cache rolled by one", _CACHE, lambda e, x: _rolled(e, x, 2))
_define("the cache rounded to bfloat16", _CACHE, lambda e, x: e.through(x, "BFLOAT16"))
_define("the cache of another row", _CACHE, lambda e, x: _rolled(e, x, 0))
_define("the cache of another head", _CACHE, lambda e, x: _rolled(e, x, 1))
_define("the cache scaled by 1 %", _CACHE, lambda e, x: e.op("Mul", x, e.like(1.01, x)))

_define(
    "an adapter's input not read", _PACKED, lambda e, x: e.op("Add", _zeros(e, x), e.like(1, x))
)
_define("an adapter's input shifted by one", _PACKED, lambda e, x: _rolled(e, x, 0))
_define("an adapter's input rounded to float16", _PACKED, lambda e, x: e.through(x, "FLOAT16"))
_define("an adapter's input rounded to bfloat16", _PACKED, lambda e, x: e.through(x, "BFLOAT16"))
_define("an adapter's input doubled", _PACKED, lambda e, x: e.op("Mul", x, e.like(2, x)))

_define("the bank rounded to bfloat16", _BANK, lambda e, x: e.through(x, "BFLOAT16"))
_define("the bank's rows shifted by one", _BANK, lambda e, x: _rolled(e, x, 0))
_define("the bank's columns shifted by one", _BANK, lambda e, x: _rolled(e, x, 1))
_define(
    "adapter ids off by one",
    _ADAPTER_IDS,
    lambda e, x: e.op("Max", e.op("Sub", x, e.number(1)), e.number(0)),
)
_define("adapter ids clamped at 1", _ADAPTER_IDS, _clamped(1))
_define("the first row's adapter for all rows", _ADAPTER_IDS, _first_row_for_all)
_define("adapter ids of rows beyond 4 copied", _ADAPTER_IDS, _rows_from(4))
_define("adapter ids of rows beyond 32 copied", _ADAPTER_IDS, _rows_from(32))
_define("adapter ids in reverse", _ADAPTER_IDS, lambda e, x: _rolled(e, x, 0))


@INPUTS.kind("key and value of a cache exchanged", _CACHE)
def exchanged_cache(copy: Copy, place: Place) -> None:
    file, name = place
    graph, value = _input(copy, place)
    other = name[: name.rindex(".")] + (".value" if name.endswith(".key") else ".key")
    after_input_(graph, value, lambda e, x: e.op("Identity", _input(copy, (file, other))[1]))


@INPUTS.kind("the default of an optional input shifted by one", _PACKED, everywhere=True)
def default_shifted(copy: Copy, place: Place) -> None:
    _change_default_(copy, place, lambda values: values.take(range(-1, values.size - 1)))


@INPUTS.kind("the default of an optional input lost", _PACKED, everywhere=True)
def default_lost(copy: Copy, place: Place) -> None:
    _change_default_(copy, place, lambda values: values * 0)


@INPUTS.kind("the default of an optional input is an adapter", _PACKED, everywhere=True)
def default_is_adapter(copy: Copy, place: Place) -> None:
    name = next(iter(copy.artifact.list_adapters()))
    _change_default_(copy, place, lambda values: copy.packed(name)[place[1]])


def _change_default_(copy: Copy, place: Place, change) -> None:
    file, name = place
    value = copy.graphs[file].graph.initializers.get(name)
    if value is not None:
        old = value.const_value
        new = change(old.numpy()).astype(old.numpy().dtype)
        value.const_value = ir.Tensor(new, dtype=old.dtype, name=name)
