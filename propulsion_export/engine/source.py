"""Read an artifact's ONNX graph and make it one that TensorRT keeps whole."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from propulsion_export.errors import ArtifactError, UnavailableError
from propulsion_export.manifest import BANK_INPUT, GRAPH_FILE, PACKED_INPUTS
from propulsion_export.scales import Array

if TYPE_CHECKING:
    import onnx_ir as ir


def read_graph(directory: Path, name: str = GRAPH_FILE) -> "ir.Model":
    """Load the graph `name`, its weights left on disk.

    Raises:
        ArtifactError: it is no ONNX file, or keeps weights outside the directory.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    file = directory / name
    try:
        model = ir.load(file)
    except DecodeError as error:
        raise ArtifactError(f"{file}: is no ONNX file ({error})") from error
    inside = directory.resolve()
    escaping = [
        f"{file}: keeps weights in {location!r}, expected a file inside its directory"
        for location in external_files(model)
        if ".." in Path(location).parts
        or not (directory / location).resolve().is_relative_to(inside)
    ]
    if escaping:
        raise ArtifactError(*escaping, remedy="Export it again.")
    return model


def read_settings(directory: Path) -> dict[str, Any]:
    """The model's config.json; empty where there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    file = directory / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file}: is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ArtifactError(f"{file}: is a {type(settings).__name__}, expected settings by name")
    return settings


def external_files(model: "ir.Model") -> tuple[str, ...]:
    """The files beside the graph that its weights lie in."""
    import onnx_ir as ir

    tensors = (
        tensor.location for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)
    )
    return tuple(dict.fromkeys(str(location) for location in tensors))


def require_inputs_(model: "ir.Model", *, constant: Sequence[str] = ()) -> None:
    """Take the defaults of inputs out, in place: the parser drops inputs that have one.

    Inputs named in `constant` go the other way: they keep their default and are inputs no more.
    Fixed dimensions that were exported as symbols of digits become numbers.
    """
    graph = model.graph
    for value in list(graph.inputs):
        _fix_digits_(value)
        if value.name is None or value.name not in graph.initializers:
            continue
        if value.name in constant:
            graph.inputs.remove(value)
        else:
            graph.initializers.pop(value.name)
            value.const_value = None
    for value in graph.outputs:
        _fix_digits_(value)


def check_operators(model: "ir.Model", name: str) -> None:
    """Refuse by name what TensorRT would refuse without saying where.

    The exporter counts the tokens of each expert with a ScatterElements that adds.

    Raises:
        UnavailableError: `name`, the model, has an operator that TensorRT lacks.
    """
    adding = [
        f"{name}: its node {node.name!r} is a ScatterElements that adds up, as in a mixture of "
        "experts, which TensorRT cannot build; expected a model without experts"
        for graph in _graphs(model)
        for node in graph
        if node.op_type == "ScatterElements" and _reduction(node) != "none"
    ]
    if adding:
        raise UnavailableError(adding[0], remedy="Run its ONNX export in ONNX Runtime.")


def _reduction(node: "ir.Node") -> str:
    attribute = node.attributes.get("reduction")
    return "none" if attribute is None else str(attribute.value)


def adapter_inputs(model: "ir.Model") -> tuple[str, ...]:
    """Those of the graph's inputs that carry adapters."""
    names = {value.name for value in model.graph.inputs}
    return tuple(name for name in (*PACKED_INPUTS, BANK_INPUT) if name in names)


def give_default_(model: "ir.Model", name: str, values: Array) -> None:
    """Let an input have a default, in place."""
    import onnx_ir as ir

    value = next(value for value in model.graph.inputs if value.name == name)
    value.shape = ir.Shape(values.shape)
    value.const_value = ir.tensor(values, name=name)
    model.graph.register_initializer(value)


def _tensors(model: "ir.Model") -> Iterator[Any]:
    import onnx_ir as ir

    for graph in _graphs(model):
        yield from (value.const_value for value in graph.initializers.values())
        for attribute in (item for node in graph for item in node.attributes.values()):
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value


def _graphs(model: "ir.Model") -> Iterator["ir.Graph"]:
    yield from model.graphs()
    for function in model.functions.values():
        yield from (function.graph, *function.subgraphs())


def _fix_digits_(value: "ir.Value") -> None:
    import onnx_ir as ir

    if value.shape is not None:
        value.shape = ir.Shape(
            int(text) if (text := str(getattr(size, "value", size))).isdigit() else size
            for size in value.shape
        )
