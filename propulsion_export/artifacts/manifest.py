"""The manifest of an artifact, `propulsion.json`: its inputs and outputs, and its provenance.

It records where each scale is in the packed graph inputs, which base model and adapters the
artifact was made from, and with which tools. Reading a manifest checks everything that can be
checked without the files it names.
"""

import hashlib
import json
import math
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from propulsion_export.adapters.names import BASE_NAME, is_fit_name
from propulsion_export.adapters.scales import Side
from propulsion_export.artifacts.file_names import BASE_FEEDS, ENCODER_DECODER_FILES
from propulsion_export.artifacts.tensor_names import PACKED_INPUTS
from propulsion_export.artifacts.typed_json import convert
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.base_model.tasks import TASKS, TaskName
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.errors import ArtifactError

SCHEMA_VERSION = 1
DEFAULT_OPSET = 20  # the newest opset that every supported TensorRT builds engines from
# Remedies: for a damaged artifact, a merged checkpoint among them, and an unknown adapter.
COPY_AGAIN = "Copy the whole directory again, or make the artifact again."
ADD_ONE = "`propulsion-export adapter add` adds one."

ArtifactKind = Literal["merged", "onnx", "engine"]
Mode = Literal["folded", "switchable", "bank"]
Dtype = Literal["float32", "float16", "bfloat16"]
Exporter = Literal["transformers", "genai"]
ExecutionProvider = Literal["cpu", "cuda", "dml", "webgpu"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    `shape` holds sizes and names of symbolic dimensions, such as `("batch", "sequence")`; an
    `optional` input has a default inside the graph.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    optional: bool = False


@dataclass(frozen=True)
class GraphEntry:
    """The inputs and outputs of one of an artifact's several graphs."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Slot:
    """Where one tensor is in a packed, flat graph input.

    `path` is a module path for scales and biases, a parameter name for saved modules; `offset` and
    `length` count elements; `shape` is the tensor's own.
    """

    path: str
    offset: int
    length: int
    shape: tuple[int, ...]
    side: Side = "output"


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of an artifact.

    `file` holds the values of all packed inputs (switchable only); `source` is the directory the
    adapter was read from; `labels` are its class names in the order of the first `len(labels)`
    logits, and the other logits are padding; `problem_type` is what the logits mean in text
    classification, None where nobody says; `chat_template` is the template that it was trained
    with, None where that is the artifact's own.
    """

    digest: str
    source: str
    size: int
    file: str | None = None
    labels: tuple[str, ...] | None = None
    problem_type: ProblemType | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class BaseEntry:
    """The base model an artifact was made from: where it was read, and how to recognise it.

    `labels` are the class names of the head that the base model has in the artifact, and
    `problem_type` is what its logits mean. `own_head` is false if the checkpoint has no head, so
    that the first adapter's is used.
    """

    source: str
    fingerprint: Fingerprint
    labels: tuple[str, ...] | None = None
    own_head: bool = True
    problem_type: ProblemType | None = None


@dataclass(frozen=True)
class EngineEntry:
    """The runtime, targets and options that an engine was built with."""

    runtime: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    targets: tuple[str, ...]
    profiles: tuple[dict[str, dict[str, list[int]]], ...]
    options: dict[str, Any]
    onnx_digest: str


@dataclass(frozen=True)
class QuantizationEntry:
    """How the weights of the base model's linear layers are quantised in a graph.

    Attributes:
        bits: of a weight; integers are symmetric, weight = scale * integer.
        form: `matmulnbits`, ONNX Runtime's operator, or `qdq`, a DequantizeLinear before each
            MatMul, which TensorRT takes too.
        block_size: how many weights along a layer's input share a scale; 0: one scale for each
            output channel.
        accuracy_level: of MatMulNBits, in what it computes: 1 float32, 4 int8 activations, 0 the
            runtime's choice; None in the form `qdq`.
        activations: the dtype that the inputs of linear layers are quantised to in the graph.
    """

    bits: Literal[4, 8]
    form: Literal["matmulnbits", "qdq"]
    block_size: int
    accuracy_level: int | None = None
    activations: Literal["int8"] | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of `propulsion.json`.

    Attributes:
        kind: `merged` (a transformers checkpoint), `onnx` or `engine`.
        mode: `folded` (the adapter is in the weights), `switchable` (its scales are inputs) or
            `bank` (each row of a batch chooses a row of one input that holds many adapters).
        task: such as `text-classification`.
        dtype: the dtype of weights and activations.
        inputs: the inputs of the graph or engine.
        outputs: the outputs of the graph or engine.
        graphs: the graphs by file name if the artifact has several; `inputs` and `outputs` are
            empty then.
        layout: the slots in each packed input; empty when folded. A row of a bank holds these
            packed inputs one after the other.
        adapters: the adapters by name; exactly one when folded, none in a bank, whose registry
            has them.
        files: the digest, `sha256:…`, of each file by its path inside the directory.
        exporter: what produced the graph: transformers' exporter, or onnxruntime-genai's builder,
            whose graphs read rows that are padded on the right.
        execution_provider: of ONNX Runtime, for which the graph was built.
        quantization: how the base model's weights are quantised; None where they are not.
    """

    kind: ArtifactKind
    mode: Mode
    task: TaskName
    dtype: Dtype
    base: BaseEntry
    adapters: dict[str, AdapterEntry]
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    graphs: dict[str, GraphEntry] = field(default_factory=dict)
    layout: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    engine: EngineEntry | None = None
    tools: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    exporter: Exporter = "transformers"
    execution_provider: ExecutionProvider = "cpu"
    quantization: QuantizationEntry | None = None

    @property
    def pads_right(self) -> bool:
        """Whether the rows of a batch are padded at their end, as genai's decoders need them."""
        return self.exporter == "genai"

    def to_json(self) -> str:
        """The manifest as JSON text, keys in the order above."""
        value = {"schema_version": SCHEMA_VERSION} | asdict(self)
        value["base"]["fingerprint"] = self.base.fingerprint.to_json()
        return json.dumps(value, indent=2) + "\n"

    def to_file(self) -> bytes:
        """The content of the file: `to_json` and a `digest` of its fields but `files`."""
        value = json.loads(self.to_json())
        text = json.dumps(value | {"digest": _digest_of(value)}, indent=2) + "\n"
        return text.encode()


def read_manifest(file: Path, *, shown: Path | None = None) -> Manifest:
    """Read and check a manifest; messages name it `shown`, by default `file`.

    Raises:
        ArtifactError: it is damaged, of another schema version, contradicts itself, or is not
            what its `digest` recorded; one of an earlier version has none.
    """
    where = shown or file
    refuse_pointers([file], ArtifactError)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: is not valid JSON ({error})") from error
    if isinstance(value, dict) and value.get("kind") == "triton":
        raise ArtifactError(
            f"{where.parent}: is a package for Triton, expected an artifact",
            remedy="Use the artifact that it was made from, and package that again.",
        )
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:  # True equals 1 too
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise ArtifactError(
            f"{where}: schema_version is {version!r}, expected {SCHEMA_VERSION}",
            remedy="Upgrade propulsion-export to read it." if newer else "Export it again.",
        )
    digest = value.pop("digest", None)
    unchanged = digest in (None, _digest_of(value))
    del value["schema_version"]
    try:
        manifest = typing.cast(Manifest, convert(Manifest, value, "manifest"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{where}: {error}") from error
    if findings := [*_impossible_values(manifest), *_misplaced_slots(manifest)]:
        raise ArtifactError(*(f"{where}: {finding}" for finding in findings))
    if not unchanged:
        raise ArtifactError(
            f"{where}: its content is not what its field `digest` recorded",
            remedy=COPY_AGAIN,
        )
    return manifest


def _digest_of(value: dict[str, Any]) -> str:
    """`sha256:…` of a manifest's fields, however they are laid out as text.

    But for `files`: the files themselves show whether that is right.
    """
    fields = {name: field for name, field in value.items() if name != "files"}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _impossible_values(manifest: Manifest) -> list[str]:
    """What the types allow but no artifact has."""
    return [
        *_impossible_adapters(manifest),
        *_impossible_mode(manifest),
        *_impossible_graphs(manifest),
    ]


def _impossible_adapters(manifest: Manifest) -> list[str]:
    found = []
    if BASE_NAME in manifest.adapters:
        found.append(f"an adapter is called {BASE_NAME!r}, which means the base model")
    found += [
        f"an adapter is called {name!r}, which no file can be called"
        for name in manifest.adapters
        if name != BASE_NAME and not is_fit_name(name)
    ]
    found += [
        f"the adapter {name!r} is fed from {BASE_FEEDS}, which is the base model"
        for name, entry in manifest.adapters.items()
        if entry.file == BASE_FEEDS
    ]
    if manifest.mode == "switchable":
        found += [
            f"the adapter {name!r} has no file, expected one with its packed inputs"
            for name, entry in manifest.adapters.items()
            if not entry.file
        ]
    return found


def _impossible_mode(manifest: Manifest) -> list[str]:
    found = []
    if (manifest.kind == "engine") != (manifest.engine is not None):
        found.append(f"engine is {manifest.engine!r} in an artifact of kind {manifest.kind!r}")
    if manifest.mode != "folded" and manifest.kind == "merged":
        found.append(f"mode is {manifest.mode!r} in a merged checkpoint, expected 'folded'")
    if manifest.mode == "bank" and manifest.adapters:
        found.append("a bank's adapters are in the manifest, expected them in its registry alone")
    decodes = TASKS[manifest.task].architecture == "decoder"
    if manifest.exporter == "genai" and (manifest.kind != "onnx" or not decodes):
        found.append(
            f"exporter is 'genai' of an artifact of kind {manifest.kind!r} for {manifest.task}, "
            "expected 'transformers'"
        )
    if manifest.mode == "folded" and len(manifest.adapters) > 1:
        found.append(f"{len(manifest.adapters)} adapters are folded in, expected one")
    if manifest.kind == "merged" and not manifest.adapters:
        found.append("no adapter is folded into a merged checkpoint, expected one")
    return found


def _impossible_graphs(manifest: Manifest) -> list[str]:
    found = []
    pair = TASKS[manifest.task].architecture == "encoder-decoder"
    several = manifest.kind == "onnx" and pair
    if manifest.graphs.keys() != (set(ENCODER_DECODER_FILES) if several else set()):
        graphs = ", ".join(ENCODER_DECODER_FILES) if several else "none"
        found.append(f"graphs are {', '.join(manifest.graphs) or 'none'}, expected {graphs}")
    if manifest.graphs and (manifest.inputs or manifest.outputs):
        found.append("inputs and outputs are given beside several graphs, expected none")
    return found


def _misplaced_slots(manifest: Manifest) -> list[str]:
    found = [
        f"layout has the input {packed!r}, expected one of {', '.join(PACKED_INPUTS)}"
        for packed in manifest.layout
        if packed not in PACKED_INPUTS
    ]
    for packed, slots in manifest.layout.items():
        offset = 0
        for slot in slots:
            if min((slot.length, *slot.shape)) < 1 or slot.length != math.prod(slot.shape):
                found.append(
                    f"{packed}: {slot.path} has length {slot.length} and shape {list(slot.shape)}"
                )
            if slot.offset != offset:
                found.append(f"{packed}: {slot.path} is at {slot.offset}, expected {offset}")
            offset = slot.offset + slot.length
    return found
