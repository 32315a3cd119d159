"""Parse a graph to a TensorRT network, and check that nothing was lost."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.errors import ArtifactError, ToolError
from propulsion_export.graph.files import external_files

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
# Without a driver, each error of the Python API is followed by this one, which says nothing.
_FOLLOW_UP = "cudaError 35"
# Only a warning in TensorRT, although no input can then have its maximum shape.
_CONTRADICTION = "not self-consistent"
_REMEDY = "Export again with this version, with --opset 20, and not optimised for ONNX Runtime."


@dataclass(frozen=True)
class Log:
    """Errors that TensorRT logged; `logger` is the object that TensorRT takes."""

    logger: Any
    errors: list[str]

    def check(self, where: str) -> None:
        """Raise ToolError with what was logged since the start, if anything was."""
        if self.errors:
            raise ToolError(*(f"{where}: {error}" for error in self.errors))


@dataclass(frozen=True)
class Network:
    """A parsed network with its builder and parser, which must live as long."""

    builder: Any
    definition: Any
    parser: Any
    log: Log

    @property
    def inputs(self) -> list[Any]:
        """Its input tensors, in the graph's order."""
        return [self.definition.get_input(i) for i in range(self.definition.num_inputs)]

    @property
    def outputs(self) -> list[Any]:
        """Its output tensors, in the graph's order."""
        return [self.definition.get_output(i) for i in range(self.definition.num_outputs)]


def collect_errors(trt: Any) -> Log:
    """A logger that keeps errors: TensorRT's Python API logs most of them and does not raise."""
    errors: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR or _CONTRADICTION in message:
                errors.extend(filter(None, [_readable(message)]))

    return Log(Collector(), errors)


def parse(trt: Any, model: ir.Model, directory: Path) -> Network:
    """Parse a graph whose external weights lie in `directory`, and check that all of it arrived.

    Raises:
        ToolError: TensorRT refuses a node, which the message names, or has dropped an input or
            output.
    """
    log = collect_errors(trt)
    builder = trt.Builder(log.logger)
    # The flag's bit differs between versions; TensorRT 11 and RTX know no other kind of network.
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, log.logger)
    with _beside_weights(model, directory) as file:
        parsed = parser.parse_from_file(str(file))
    if not parsed or parser.num_errors:
        raise ToolError(*_parser_errors(parser), remedy=_REMEDY)
    log.check(GRAPH_FILE)
    network = Network(builder, definition, parser, log)
    _check_complete(model, network)
    _allow_decomposed_attention_(trt, definition)
    return network


def specs_of(tensors: Sequence[Any], declared: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The network's inputs or outputs; symbolic dimensions are named as the manifest names them.

    Raises:
        ArtifactError: the manifest does not declare one of them, or with another rank.
    """
    by_name = {spec.name: spec for spec in declared}
    wrong = [
        f"{GRAPH_FILE}: has {tensor.name!r} of {len(tensor.shape)} dimensions, expected it in the "
        "manifest so"
        for tensor in tensors
        if tensor.name not in by_name or len(by_name[tensor.name].shape) != len(tensor.shape)
    ]
    if wrong:
        raise ArtifactError(*wrong, remedy="Export it again.")
    return tuple(_spec(tensor, by_name[tensor.name]) for tensor in tensors)


def _readable(message: str) -> str:
    lines = (line.strip() for line in message.splitlines() if _FOLLOW_UP not in line)
    return " ".join(line for line in lines if line)


@contextmanager
def _beside_weights(model: ir.Model, directory: Path) -> Iterator[Path]:
    """A temporary file of the graph, with links to its weights beside it for the parser."""
    with tempfile.TemporaryDirectory(prefix="propulsion-export-") as scratch:
        file = Path(scratch) / GRAPH_FILE
        for location in external_files(model):
            link = file.parent / location
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((directory / location).resolve())
        ir.save(model, file)
        yield file


def _parser_errors(parser: Any) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = (
            f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
        )
        yield f"{GRAPH_FILE}: {node}TensorRT says: {_readable(error.desc())}"


def _check_complete(model: ir.Model, network: Network) -> None:
    have = {tensor.name for tensor in (*network.inputs, *network.outputs)}
    dropped = [
        f"{GRAPH_FILE}: TensorRT dropped the {kind} {value.name!r}, expected it in the network"
        for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs))
        for value in values
        if value.name not in have
    ]
    if dropped:
        raise ToolError(*dropped)


def _allow_decomposed_attention_(trt: Any, definition: Any) -> None:
    """Without it an Attention node builds only in the types and shapes that have a fused kernel."""
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # the documented cast
            layer.attention.decomposable = True


def _spec(tensor: Any, declared: TensorSpec) -> TensorSpec:
    shape = tuple(
        name if size == -1 else int(size)
        for size, name in zip(tensor.shape, declared.shape, strict=True)
    )
    dtype = _DTYPES.get(tensor.dtype.name, declared.dtype)
    return replace(declared, dtype=dtype, shape=shape, optional=False)
