"""Run a graph with its intermediate values as further outputs, in a temporary copy."""

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from propulsion_export.artifacts.artifact import Artifact, Runner
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, PACKED_INPUTS
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.passes.float_layers import ComputeInFloat
from propulsion_export.parity.bisect.places import Places, find_places
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.reference import reference_runner
from propulsion_export.scaling.attach_rows import scaled_elsewhere

ADAPTER_INPUTS = {*PACKED_INPUTS, BANK_INPUT, IDS_INPUT}
# Lengths and shapes must be inside the graph: runtimes read them while inferring shapes.
_INLINE_BYTES = 64 * 1024
_PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class MarkedGraph:
    """A graph whose intermediate values are outputs.

    Attributes:
        run: runs it; besides the graph's own outputs it returns every marked value by name.
        outputs: the names of the graph's own outputs.
        places: where the outputs of modules are among the values.
    """

    run: Runner
    outputs: frozenset[str]
    places: Places


def mark_graph(artifact: Artifact, name: str, runner: str, model: Any) -> MarkedGraph:
    """Open a copy of a graph with all values that depend on the data as outputs.

    Quantised layers compute in floating point, as for the cases of parity. A runtime cannot fuse
    what is an output, so that its numbers may differ from the artifact's in their last bits.

    Args:
        artifact: what the graph is of.
        name: its file.
        runner: the runtime, see `runners.table`.
        model: the base model in PyTorch, whose modules are looked for.

    Raises:
        ToolError, UnavailableError: the runtime cannot load the copy.
    """
    program = read_graph(artifact.directory, name)
    outputs = frozenset(str(value.name) for value in program.graph.outputs)
    active = active_values(program.graph)
    places = _places(artifact, program, model, active)
    if artifact.manifest.quantization is not None:
        ComputeInFloat()(program)
        active = active_values(program.graph)
    _show_sums_(program.graph, active)
    for value in active:
        if str(value.name) not in outputs and _may_be_float(value):
            program.graph.outputs.append(value)
    with tempfile.TemporaryDirectory(prefix="propulsion-export-") as place:
        copy = Path(place) / name
        weights = f"{name}.data"
        ir.save(program, copy, external_data=weights, size_threshold_bytes=_INLINE_BYTES)
        return MarkedGraph(_open(copy, artifact, runner), outputs, places)


def _places(
    artifact: Artifact, program: ir.Model, model: Any, active: Collection[ir.Value]
) -> Places:
    """Where modules' outputs are; a bank has none of those that it scales further on."""
    manifest = artifact.manifest
    found = find_places(program, model, active, manifest.exporter)
    elsewhere = scaled_elsewhere(manifest.layout) if manifest.mode == "bank" else ()
    return {call: places for call, places in found.items() if call[0] not in elsewhere}


def active_values(graph: ir.Graph) -> dict[ir.Value, None]:
    """The values of a graph that depend on the data, and not on weights and adapters alone."""
    data = {value for value in graph.inputs if value.name not in ADAPTER_INPUTS}
    active: dict[ir.Value, None] = {}
    for node in graph:
        if any(value in data or value in active for value in _read_by(node)):
            active |= dict.fromkeys(value for value in node.outputs if value.name)
    return active


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, graphs inside it included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.value:
                yield from _read_by(inner)


def _show_sums_(graph: ir.Graph, active: dict[ir.Value, None]) -> None:
    """Compute what a norm with a residual inside reads: the sum is no value of the graph."""
    for node in list(graph):
        if not node.op_type.startswith("Skip") or "LayerNormalization" not in node.op_type:
            continue
        left, right = node.inputs[:2]
        if left is None or right is None:
            continue
        new = ir.node("Add", [left, right], name=f"{node.name}/sum")
        new.outputs[0].name, new.outputs[0].type = f"{node.name}/sum", left.type
        graph.insert_before(node, new)
        active[new.outputs[0]] = None


def _may_be_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _open(copy: Path, artifact: Artifact, runner: str) -> Runner:
    if runner == "reference":
        return reference_runner(copy)
    built_for = artifact.manifest.execution_provider
    provider = _PROVIDERS[runner if built_for == "cpu" else f"onnxruntime-{built_for}"]
    return onnxruntime_runner(copy, provider)
