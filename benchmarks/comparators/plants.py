"""Mistakes that an export can make, planted into the toys' right exports."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from subjects import LONGEST, WORD, Subject

from propulsion_export import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.graph.files import read_graph, write_graph

ATTENTION = {
    "encoder": "bert.encoder.layer.{}.attention.self.{}",
    "decoder": "model.layers.{}.self_attn.{}_proj",
}
WORDS = {
    "encoder": "bert.embeddings.word_embeddings.weight",
    "decoder": "model.embed_tokens.weight",
}
NARROWER = {"float32": ir.DataType.FLOAT16, "float16": ir.DataType.BFLOAT16}
BOTH = ("encoder", "decoder")


@dataclass(frozen=True)
class Plant:
    """A kind of mistake, and how to make an artifact with it in a new directory."""

    name: str
    kinds: tuple[str, ...]
    make: Callable[[Subject, Path], object]


def in_adapter(change: Callable[[Subject, Adapter], Adapter]) -> Callable[[Subject, Path], object]:
    """Fold what the mistake makes of the adapter."""
    return lambda subject, directory: subject.export(change(subject, subject.adapter), directory)


def in_graph(change: Callable[[Subject, ir.Model], None]) -> Callable[[Subject, Path], object]:
    """Change the right graph, in place."""

    def make(subject: Subject, directory: Path) -> None:
        shutil.copytree(subject.clean, directory)
        model = read_graph(subject.clean)
        change(subject, model)
        (directory / "model.onnx.data").unlink(missing_ok=True)
        write_graph(model, directory)
        manifest = Artifact.read(subject.clean).manifest
        names = {value.name for value in model.graph.outputs}
        outputs = tuple(output for output in manifest.outputs if output.name in names)
        Artifact.write(directory, replace(manifest, outputs=outputs, files={}))

    return make


def nothing(subject: Subject, directory: Path) -> None:
    shutil.copytree(subject.clean, directory)


def adapter_dropped(subject: Subject, right: Adapter) -> Adapter:
    """Scales that change nothing but, here and there, a weight's last bit; ones are refused."""
    one = float(np.nextafter(np.float32(1), np.float32(2)))
    idle = {path: Scale(np.full_like(s.values, one), s.side) for path, s in right.scales.items()}
    return replace(right, scales=idle)


def other_adapter(subject: Subject, right: Adapter) -> Adapter:
    return replace(right, scales=Adapter.read(subject.root / "other", "tuned").scales)


def scale_moved(subject: Subject, right: Adapter) -> Adapter:
    return change_value(subject, right, lambda values: np.roll(values, 1))


def query_and_value_exchanged(subject: Subject, right: Adapter) -> Adapter:
    value = ATTENTION[subject.kind].format(0, "v" if subject.kind == "decoder" else "value")
    key = ATTENTION[subject.kind].format(0, "k" if subject.kind == "decoder" else "key")
    scales = dict(right.scales)
    scales[value], scales[key] = scales[key], scales[value]
    return replace(right, scales=scales)


def channel_off(share: float, subject: Subject, right: Adapter) -> Adapter:
    def off(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed[5] *= 1 + share
        return changed

    return change_value(subject, right, off)


def change_value(
    subject: Subject, right: Adapter, change: Callable[[np.ndarray], np.ndarray]
) -> Adapter:
    """Change the scale of the second layer's values."""
    path = ATTENTION[subject.kind].format(1, "v" if subject.kind == "decoder" else "value")
    scale = right.scales[path]
    return replace(right, scales=right.scales | {path: Scale(change(scale.values), scale.side)})


def bias_outside_the_product(subject: Subject, right: Adapter) -> Adapter:
    # (x W^T + b / s) * s = (x W^T) * s + b
    divided = {path: bias / right.scales[path].values for path, bias in right.biases.items()}
    return replace(right, biases={path: bias.astype(np.float32) for path, bias in divided.items()})


def trained_biases_lost(subject: Subject, right: Adapter) -> Adapter:
    return replace(right, biases={})


def other_base(subject: Subject, directory: Path) -> object:
    return subject.export(subject.adapter, directory, base=subject.root / "sibling")


def class_rows_exchanged(subject: Subject, right: Adapter) -> Adapter:
    rolled = {name: np.roll(values, 1, axis=0) for name, values in right.modules.items()}
    return replace(right, modules=rolled)


def one_token_is_nan(subject: Subject, model: ir.Model) -> None:
    edit(model, WORDS[subject.kind], lambda table: set_rows(table, WORD, np.nan))


def all_is_nan(subject: Subject, model: ir.Model) -> None:
    edit(model, WORDS[subject.kind], lambda table: set_rows(table, slice(None), np.nan))


def last_token_zeroed(subject: Subject, model: ir.Model) -> None:
    edit(model, WORDS[subject.kind], lambda table: set_rows(table, -1, 0))


def positions_zeroed(subject: Subject, model: ir.Model) -> None:
    name = "bert.embeddings.position_embeddings.weight"
    edit(model, name, lambda table: set_rows(table, slice(64, LONGEST), 0))


def second_type_zeroed(subject: Subject, model: ir.Model) -> None:
    name = "bert.embeddings.token_type_embeddings.weight"
    edit(model, name, lambda table: set_rows(table, 1, 0))


def epsilon_lost(subject: Subject, model: ir.Model) -> None:
    """Set every norm's epsilon to 1e-3: an attribute, or a small number that is added."""
    norms = [node for node in model.graph if "epsilon" in node.attributes]
    for node in norms:
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    added = {
        value.name: value.const_value.numpy()
        for node in model.graph
        for value in node.inputs
        if node.op_type == "Add" and value is not None and value.const_value is not None
    }
    small = [name for name, number in added.items() if number.size == 1 and 0 < number < 1e-4]
    for name in small:
        edit(model, name, lambda number: np.full_like(number, 1e-3))
    assert norms or small, "no norm has an epsilon"


def weights_narrowed(subject: Subject, model: ir.Model) -> None:
    """Round every matrix to the next narrower type and back."""
    narrower = NARROWER[subject.dtype].numpy()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 1:
            edit(model, name, lambda table: table.astype(narrower).astype(table.dtype))


def ids_in_8_bits(subject: Subject, model: ir.Model) -> None:
    """Cast the token ids to uint8 and back."""
    ids = input_of(model, "input_ids")
    narrow = node("Cast", [ids], to=ir.DataType.UINT8)
    replace_input(model, ids, [narrow, node("Cast", [narrow.outputs[0]], to=ir.DataType.INT64)])


def mask_ignored(subject: Subject, model: ir.Model) -> None:
    """Put ones in the place of the attention mask."""
    mask = input_of(model, "attention_mask")
    shape = node("Shape", [mask])
    one = ir.tensor(np.ones(1, np.int64))
    ones = node("ConstantOfShape", [shape.outputs[0]], value=one)
    replace_input(model, mask, [shape, ones])


def keys_one_position_late(subject: Subject, model: ir.Model) -> None:
    """Return the first layer's keys rolled by one position."""
    keys = output_of(model, "present.0.key")
    last, rest = part(keys, (-1, 2**31), axis=2), part(keys, (0, -1), axis=2)
    rolled = node("Concat", [last[-1].outputs[0], rest[-1].outputs[0]], axis=2)
    replace_output(model, keys, [*last, *rest, rolled])


def output_missing(subject: Subject, model: ir.Model) -> None:
    model.graph.outputs.remove(output_of(model, "present.1.value"))


def last_token_only(subject: Subject, model: ir.Model) -> None:
    """Return the logits of the last token alone."""
    logits = output_of(model, "logits")
    replace_output(model, logits, part(logits, (-1, 2**31), axis=1))


def rows_are_copies(subject: Subject, model: ir.Model) -> None:
    """Let every row from the fourth on be a copy of the fourth."""
    logits = output_of(model, "logits")
    shape = node("Shape", [logits], start=0, end=1)
    zero, one, last = (constant(np.int64(number)) for number in (0, 1, 3))
    axes = constant(np.zeros(1, np.int64))
    count = node("Squeeze", [shape.outputs[0], axes.outputs[0]])
    rows = node("Range", [zero.outputs[0], count.outputs[0], one.outputs[0]])
    clamped = node("Min", [rows.outputs[0], last.outputs[0]])
    chosen = node("Gather", [logits, clamped.outputs[0]], axis=0)
    replace_output(model, logits, [shape, zero, one, last, axes, count, rows, clamped, chosen])


def classes_renamed(subject: Subject, directory: Path) -> None:
    """Name the classes in another order, in the manifest and in config.json."""
    shutil.copytree(subject.clean, directory)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    names = list(config["id2label"].values())
    renamed = [*names[1:], names[0]]
    config["id2label"] = {str(index): name for index, name in enumerate(renamed)}
    config["label2id"] = {name: index for index, name in enumerate(renamed)}
    file.write_text(json.dumps(config))
    manifest = Artifact.read(subject.clean).manifest
    entries = {
        name: replace(entry, labels=tuple(renamed)) for name, entry in manifest.adapters.items()
    }
    Artifact.write(directory, replace(manifest, adapters=entries, files={}))


def set_rows(table: np.ndarray, rows: int | slice, number: float) -> np.ndarray:
    changed = table.copy()
    changed[rows] = number
    return changed


def edit(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None, name
    value.const_value = ir.tensor(change(value.const_value.numpy()), name=name)


def node(kind: str, inputs: list[ir.Value], **attributes: object) -> ir.Node:
    return ir.node(kind, inputs, attributes=attributes or None)


def constant(value: np.ndarray | np.int64) -> ir.Node:
    return node("Constant", [], value=ir.tensor(np.asarray(value)))


def part(value: ir.Value, bounds: tuple[int, int], axis: int) -> list[ir.Node]:
    """The nodes of a slice, itself the last."""
    numbers = [constant(np.array([number], np.int64)) for number in (*bounds, axis)]
    return [*numbers, node("Slice", [value, *(each.outputs[0] for each in numbers)])]


def input_of(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def output_of(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.outputs if value.name == name)


def replace_input(model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Let everything that reads an input read the last node's output instead."""
    first = next(iter(model.graph))
    for user, place in list(value.uses()):
        user.replace_input_with(place, nodes[-1].outputs[0])
    nodes[0].replace_input_with(0, value)
    model.graph.insert_before(first, nodes)


def replace_output(model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Return the last node's output, under the name of the one that is returned now."""
    place = list(model.graph.outputs).index(value)
    new = nodes[-1].outputs[0]
    new.name, value.name = value.name, f"{value.name}.right"
    new.type, new.shape = value.type, value.shape
    model.graph.extend(nodes)
    model.graph.outputs[place] = new


PLANTS = (
    Plant("clean", BOTH, nothing),
    Plant("adapter dropped", BOTH, in_adapter(adapter_dropped)),
    Plant("another adapter's scales", BOTH, in_adapter(other_adapter)),
    Plant("a scale moved by a channel", BOTH, in_adapter(scale_moved)),
    Plant("scales of keys and values exchanged", BOTH, in_adapter(query_and_value_exchanged)),
    Plant("a channel off by 10 %", BOTH, in_adapter(partial(channel_off, 0.1))),
    Plant("a channel off by 1 %", BOTH, in_adapter(partial(channel_off, 0.01))),
    Plant("a channel off by 0.1 %", BOTH, in_adapter(partial(channel_off, 0.001))),
    Plant("biases outside the product", ("encoder",), in_adapter(bias_outside_the_product)),
    Plant("trained biases lost", ("encoder",), in_adapter(trained_biases_lost)),
    Plant("a sibling of the base model", BOTH, other_base),
    Plant("rows of the classes exchanged", ("encoder",), in_adapter(class_rows_exchanged)),
    Plant("names of the classes exchanged", ("encoder",), classes_renamed),
    Plant("NaN for one token", BOTH, in_graph(one_token_is_nan)),
    Plant("NaN everywhere", BOTH, in_graph(all_is_nan)),
    Plant("last token of the vocabulary zeroed", BOTH, in_graph(last_token_zeroed)),
    Plant("token ids in 8 bits", BOTH, in_graph(ids_in_8_bits)),
    Plant("positions from 64 on zeroed", ("encoder",), in_graph(positions_zeroed)),
    Plant("token type 1 zeroed", ("encoder",), in_graph(second_type_zeroed)),
    Plant("attention mask ignored", BOTH, in_graph(mask_ignored)),
    Plant("norms' epsilon 1e-3", BOTH, in_graph(epsilon_lost)),
    Plant("weights in a narrower type", BOTH, in_graph(weights_narrowed)),
    Plant("rows from the fourth on are copies", BOTH, in_graph(rows_are_copies)),
    Plant("keys in the cache a position late", ("decoder",), in_graph(keys_one_position_late)),
    Plant("a cache output missing", ("decoder",), in_graph(output_missing)),
    Plant("logits of the last token only", ("decoder",), in_graph(last_token_only)),
)
