"""Plan how Triton Inference Server serves an artifact, and write its `config.pbtxt`."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import MANIFEST_FILE
from propulsion_export.artifacts.manifest import EngineEntry, TensorSpec
from propulsion_export.artifacts.tensor_names import BANK_INPUT
from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.sentences.pipeline import MEAN
from propulsion_export.base_model.tasks import TASKS, Architecture
from propulsion_export.errors import UsageError

DEFAULT_MAX_BATCH_SIZE = 32
# Remedies for the architectures that Triton's backends cannot generate with.
_GENERATIVE: dict[Architecture, str] = {
    "decoder": "Package it with --layout genai.",
    "encoder-decoder": "Serve it with ONNX Runtime itself.",
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
# How long the first request of a batch waits for others: short against an encoder's run.
_QUEUE_MICROSECONDS = 500
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ServedModel:
    """A model of a Triton model repository.

    Attributes:
        name: the name of the model and of its directory.
        backend: the Triton backend that runs it.
        file: the file in the version's directory.
        inputs: the inputs of a request, [batch, …] each.
        outputs: the outputs, [batch, …] each.
        max_batch_size: the largest number of rows of a batch.
        pooling: how clients make embeddings of the tokens' vectors; None for other tasks.
    """

    name: str
    backend: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    pooling: str | None = None


def plan_model(artifact: Artifact, name: str, max_batch_size: int | None) -> ServedModel:
    """Plan how Triton serves an artifact.

    Args:
        artifact: an ONNX export or an engine.
        name: the name of the model in requests.
        max_batch_size: the largest batch; default: 32, or the most rows that an engine takes.

    Raises:
        UsageError: Triton cannot serve it.
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
        rows = _rows_of_engine(artifact.shown, manifest.engine, max_batch_size)
    if rows < 1:
        raise UsageError(f"--max-batch-size: found {rows}, expected 1 or more")
    # The bank of an ONNX export is built in; an engine that has it as an input was refused.
    inputs = tuple(spec for spec in manifest.inputs if spec.name != BANK_INPUT)
    backend = _BACKENDS[manifest.kind]
    return ServedModel(name, *backend, inputs, manifest.outputs, rows, _pooling(artifact))


def config_text(model: ServedModel) -> str:
    """The content of `config.pbtxt`: Triton's message ModelConfig in protobuf's text format.

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
{_parameters(model.pooling)}"""


def _pooling(artifact: Artifact) -> str | None:
    """The sentence pipeline's name; `mean` where there is none."""
    if TASKS[artifact.manifest.task].prediction != "embedding":
        return None
    return (read_sentence_pipeline(artifact.directory) or MEAN).label


def _parameters(pooling: str | None) -> str:
    """What clients have to do themselves, as a parameter that they can read from the server."""
    if pooling is None:
        return ""
    return f"""\
# The outputs are one vector for each token. A client makes the text's embedding of them, by this
# pooling of sentence-transformers (modules.json, where the base model has one).
parameters {{
  key: "pooling"
  value: {{ string_value: {json.dumps(pooling)} }}
}}
"""


def _check_servable(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.kind == "merged":
        found = "is of kind merged, expected an ONNX export or an engine"
        remedy = "`propulsion-export onnx` makes one."
    elif (architecture := TASKS[manifest.task].architecture) in _GENERATIVE:
        found = f"is for {manifest.task}, which Triton's backends do not generate with"
        remedy = _GENERATIVE[architecture]
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
    raise UsageError(f"{artifact.shown}: {found}", remedy=remedy)


def _rows_of_engine(directory: Path, engine: EngineEntry, requested: int | None) -> int:
    """The rows requested, or the most that the engine's first profile takes, which Triton uses."""
    shapes = list(engine.profiles[0].values()) if engine.profiles else []
    least = max((shape["min"][0] for shape in shapes), default=1)
    most = min((shape["max"][0] for shape in shapes), default=1)
    if least > 1:
        raise UsageError(
            f"{directory}: the engine takes {least} rows or more, expected 1: requests come alone",
            remedy="Build with --min-shapes of one row.",
        )
    if requested is not None and requested > most:
        raise UsageError(
            f"--max-batch-size: found {requested}, expected at most {most}, the engine's",
            remedy="Build with larger --max-shapes.",
        )
    return most if requested is None else requested


def _tensors(specs: Iterable[TensorSpec]) -> str:
    return ",\n".join(_tensor(spec) for spec in specs)


def _tensor(spec: TensorSpec) -> str:
    """One input or output, without its first dimension: Triton adds the batch itself."""
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
