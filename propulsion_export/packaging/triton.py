"""What Triton Inference Server reads: a model's configuration, and a graph with its bank inside."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from propulsion_export.artifact import Artifact
from propulsion_export.bank import Row, Snapshot, check_row
from propulsion_export.errors import UsageError
from propulsion_export.manifest import (
    BANK_INPUT,
    BASE_NAME,
    IDS_INPUT,
    MANIFEST_FILE,
    AdapterEntry,
    BaseEntry,
    EngineEntry,
    TensorSpec,
)

CONFIG_FILE = "config.pbtxt"
# Beside the configuration: Triton warns of directories there that are no version.
ADAPTERS_FILE = "adapters.json"
VERSION = "1"
BANK_FILE = "propulsion_bank.bin"
DEFAULT_MAX_BATCH_SIZE = 32
_GENERATIVE = {
    "text-generation": "Export with --mode switchable or folded, and package with --layout genai.",
    "text2text-generation": "Serve it with ONNX Runtime itself.",
}
_BACKENDS = {"onnx": ("onnxruntime", "model.onnx"), "engine": ("tensorrt", "model.plan")}
_TYPES = {
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
# How long the first request of a batch waits for others: little beside what an encoder computes.
_QUEUE_MICROSECONDS = 500
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ServedModel:
    """A model of a repository.

    Attributes:
        name: the model's, which is its directory's.
        backend: of Triton.
        file: below the version's directory.
        inputs: that a request has, [batch, …] each.
        outputs: likewise.
        max_batch_size: rows of a batch, at most.
    """

    name: str
    backend: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int


def plan_model(artifact: Artifact, name: str, max_batch_size: int | None) -> ServedModel:
    """How Triton serves an artifact.

    Args:
        artifact: an ONNX export or an engine.
        name: what clients call the model.
        max_batch_size: default: 32, of an engine as many rows as it takes.

    Raises:
        UsageError: Triton cannot serve it so.
    """
    manifest = artifact.manifest
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--model-name: found {name!r}, expected letters, digits, '_', '-' and '.'",
            remedy="It is a part of the address that clients ask.",
        )
    if name == MANIFEST_FILE:
        raise UsageError(f"--model-name: found {name!r}, which is the package's own file")
    _check_servable(artifact)
    if manifest.engine is None:
        rows = DEFAULT_MAX_BATCH_SIZE if max_batch_size is None else max_batch_size
    else:
        rows = _rows_of_engine(artifact.directory, manifest.engine, max_batch_size)
    if rows < 1:
        raise UsageError(f"--max-batch-size: found {rows}, expected 1 or more")
    # Of an ONNX export the bank is built in; an engine that has it as an input was refused.
    inputs = tuple(spec for spec in manifest.inputs if spec.name != BANK_INPUT)
    return ServedModel(name, *_BACKENDS[manifest.kind], inputs, manifest.outputs, rows)


def _check_servable(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.kind == "merged":
        found = "is of kind merged, expected an ONNX export or an engine"
        remedy = "`propulsion-export onnx` makes one."
    elif manifest.task in _GENERATIVE:
        found = f"is for {manifest.task}, which Triton's backends do not generate with"
        remedy = _GENERATIVE[manifest.task]
    elif manifest.mode == "switchable":
        found = (
            "is switchable, which means one adapter for a whole batch, expected one for each row"
        )
        remedy = "Export with --mode bank."
    elif manifest.engine is not None and manifest.engine.runtime != "tensorrt":
        found = f"is an engine of {manifest.engine.runtime}, expected one of tensorrt: Triton's "
        found += "backend loads no other"
        remedy = "Build with --runtime tensorrt, or package the ONNX export."
    elif manifest.kind == "engine" and BANK_INPUT in {spec.name for spec in manifest.inputs}:
        found = "is an engine that is fed its bank, expected it built in: requests cannot carry it"
        remedy = "Build with `propulsion-export trt --bank constant`."
    else:
        return
    raise UsageError(f"{artifact.directory}: {found}", remedy=remedy)


def _rows_of_engine(directory: Path, engine: EngineEntry, asked: int | None) -> int:
    """How many rows the engine takes, or those asked for; Triton uses the first profile."""
    shapes = list(engine.profiles[0].values()) if engine.profiles else []
    least = max((shape["min"][0] for shape in shapes), default=1)
    most = min((shape["max"][0] for shape in shapes), default=1)
    if least > 1:
        raise UsageError(
            f"{directory}: the engine takes {least} rows or more, expected 1: requests come alone",
            remedy="Build with --min-shapes of one row.",
        )
    if asked is not None and asked > most:
        raise UsageError(
            f"--max-batch-size: found {asked}, expected at most {most}, the engine's",
            remedy="Build with larger --max-shapes.",
        )
    return most if asked is None else asked


def config_text(model: ServedModel) -> str:
    """What `config.pbtxt` says: protobuf's text format of Triton's message ModelConfig.

    Raises:
        UsageError: the batch is not the first dimension of every input and output.
    """
    return f"""\
name: {json.dumps(model.name)}
backend: {json.dumps(model.backend)}
default_model_filename: {json.dumps(model.file)}
max_batch_size: {model.max_batch_size}
input [
{_tensors(model.inputs)}
]
output [
{_tensors(model.outputs)}
]
dynamic_batching {{
  max_queue_delay_microseconds: {_QUEUE_MICROSECONDS}
}}
"""


def _tensors(specs: Iterable[TensorSpec]) -> str:
    return ",\n".join(_tensor(spec) for spec in specs)


def _tensor(spec: TensorSpec) -> str:
    """One input or output; its first dimension, the batch, is not told."""
    if not spec.shape or not isinstance(spec.shape[0], str) or spec.dtype not in _TYPES:
        raise UsageError(
            f"{spec.name}: found {spec.dtype} {list(spec.shape)}, expected [batch, …] of "
            f"{', '.join(_TYPES)}"
        )
    sizes = [str(size) if isinstance(size, int) else "-1" for size in spec.shape[1:]]
    lines = [
        f"name: {json.dumps(spec.name)}",
        f"data_type: {_TYPES[spec.dtype]}",
        f"dims: [ {', '.join(sizes or ['1'])} ]",
        # Triton has no tensors without dimensions: a request has [batch, 1], the model [batch].
        *([] if sizes else ["reshape { shape: [ ] }"]),
    ]
    return "\n".join(["  {", *(f"    {line}" for line in lines), "  }"])


# The bank


class BuildInBank(ir.passes.InPlacePass):
    """Make the input `propulsion_bank` [adapters, D] an initializer that lies in BANK_FILE.

    An id that nobody has gives its own row NaN: it must neither be another client's adapter, which
    it would be below zero, nor fail the batch that other clients' rows are in.

    Args:
        directory: where the graph and the file are.
        rows: how many adapters the file has, the base model counted, before a last row of NaN.
    """

    def __init__(self, directory: Path, rows: int) -> None:
        super().__init__()
        self.directory = directory
        self.rows = rows

    def requires(self, model: ir.Model) -> None:
        bank = {value.name: value for value in model.graph.inputs}.get(BANK_INPUT)
        if bank is None or bank.dtype is None or bank.shape is None or len(bank.shape) != 2:
            raise ir.passes.PreconditionError(
                f"{BANK_INPUT}: expected an input of shape [adapters, D], found "
                f"{bank and bank.shape}"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        bank = next(value for value in model.graph.inputs if value.name == BANK_INPUT)
        assert bank.shape is not None
        assert bank.dtype is not None
        model.graph.inputs.remove(bank)
        bank.shape = ir.Shape([self.rows + 1, bank.shape[1]])
        bank.const_value = ir.ExternalTensor(
            BANK_FILE,
            offset=0,
            length=(self.directory / BANK_FILE).stat().st_size,
            dtype=bank.dtype,
            shape=bank.shape,
            name=BANK_INPUT,
            base_dir=self.directory,
        )
        model.graph.register_initializer(bank)
        self._guard_(model.graph)
        return ir.passes.PassResult(model, modified=True)

    def _guard_(self, graph: ir.Graph) -> None:
        """Let every id that nobody has choose the last row."""
        ids = next(value for value in graph.inputs if value.name == IDS_INPUT)
        uses = list(ids.uses())
        zero, last = (_constant(graph, number) for number in (0, self.rows))
        at_least = ir.node("GreaterOrEqual", [ids, zero])
        below = ir.node("Less", [ids, last])
        known = ir.node("And", [at_least.outputs[0], below.outputs[0]])
        chosen = ir.node("Where", [known.outputs[0], ids, last])
        for node, index in uses:
            node.replace_input_with(index, chosen.outputs[0])
        graph.insert_before(next(iter(graph)), [at_least, below, known, chosen])


def _constant(graph: ir.Graph, number: int) -> ir.Value:
    tensor = ir.tensor(np.array(number, np.int64), name=f"{IDS_INPUT}.{number}")
    value = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape([]),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def rows_in_use(snapshot: Snapshot) -> dict[str, Row]:
    """The rows by name, the base model's first, then in the order in which they were added."""
    rows = sorted(snapshot.rows.items(), key=lambda item: item[1].number)
    return {BASE_NAME: snapshot.base, **dict(rows)}


def write_bank(snapshot: Snapshot, rows: Iterable[Row], directory: Path) -> None:
    """Write rows behind each other as BANK_FILE, each compared with its checksum, and one of NaN.

    Raises:
        ArtifactError: a row's bytes are not the recorded ones.
    """
    with (directory / BANK_FILE).open("xb") as file:
        for row in rows:
            check_row(row, snapshot.values)
            file.write(snapshot.values[row.number].tobytes())
        file.write(np.full_like(snapshot.values[0], np.nan).tobytes())


def adapters_text(
    ids: Mapping[str, int | None], entries: Mapping[str, AdapterEntry], base: BaseEntry
) -> str:
    """What ADAPTERS_FILE says: id, labels and digest by name.

    Args:
        ids: what a request sends for each adapter; None where the model has no such input.
        entries: of the adapters, all that `ids` names but the base model.
        base: the base model, whose digest is none.
    """
    told = {}
    for name, number in ids.items():
        entry = entries.get(name)
        labels = base.labels if entry is None else entry.labels
        told[name] = {"id": number, "labels": labels, "digest": entry and entry.digest}
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"
