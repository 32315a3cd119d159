"""The record beside every model: what goes in and out, and from what it was made.

`propulsion.json` says where every scale sits in the packed graph inputs, which base model and
adapters the artifact was made from, and with which tools. Reading it checks all that can be checked
without the files it names.
"""

import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from propulsion_export.adapters.names import BASE_NAME, is_fit_name
from propulsion_export.adapters.scales import Side
from propulsion_export.artifacts.file_names import BASE_FEEDS, ENCODER_DECODER_FILES
from propulsion_export.artifacts.tensor_names import PACKED_INPUTS
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tasks import TASKS, TaskName
from propulsion_export.errors import ArtifactError

SCHEMA_VERSION = 1
DEFAULT_OPSET = 20  # the newest that every TensorRT engine builds from
ADD_ONE = "`propulsion-export adapter add` adds one."  # to an artifact that lacks an adapter


ArtifactKind = Literal["merged", "onnx", "engine"]
Mode = Literal["folded", "switchable", "bank"]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    `shape` holds numbers and names of symbolic dimensions, such as `("batch", "sequence")`; an
    `optional` input has a default inside the graph.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    optional: bool = False


@dataclass(frozen=True)
class GraphEntry:
    """One of several graphs of an artifact: what goes in and comes out."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a packed, flat graph input.

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

    `file` holds the complete feeds of the packed inputs (switchable only); `source` says where the
    adapter lay when the artifact was made; `labels` are its class names in the order of the first
    `len(labels)` logits, the rest is padding.
    """

    digest: str
    source: str
    size: int
    file: str | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BaseEntry:
    """The base model an artifact was made from: where it lay, and how to recognise it.

    `labels` are the class names of the head that the base model has in the artifact; without
    `own_head` it is the first adapter's, since the checkpoint has none.
    """

    source: str
    fingerprint: Fingerprint
    labels: tuple[str, ...] | None = None
    own_head: bool = True


@dataclass(frozen=True)
class EngineEntry:
    """What an engine was built for and how."""

    runtime: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    targets: tuple[str, ...]
    profiles: tuple[dict[str, dict[str, list[int]]], ...]
    options: dict[str, Any]
    onnx_digest: str


@dataclass(frozen=True)
class Manifest:
    """What `propulsion.json` says.

    Attributes:
        kind: `merged` (a transformers checkpoint), `onnx` or `engine`.
        mode: `folded` (the adapter is in the weights), `switchable` (its scales are inputs) or
            `bank` (each row of a batch chooses a row of one input that holds many adapters).
        task: such as `text-classification`.
        dtype: of weights and activations.
        inputs: of the graph or engine.
        outputs: likewise.
        graphs: by file name, of an artifact that is several graphs; `inputs` and `outputs` are
            empty then.
        layout: by packed input, the slots in it; empty when folded. A row of a bank is these
            packed inputs, one behind the other.
        adapters: by name; exactly one when folded, none of a bank, which has a registry of its own.
        files: `sha256:…` by path inside the directory.
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

    def to_json(self) -> str:
        """The manifest as JSON text, keys in the order above."""
        value = {"schema_version": SCHEMA_VERSION} | asdict(self)
        value["base"]["fingerprint"] = self.base.fingerprint.to_json()
        return json.dumps(value, indent=2) + "\n"


def read_manifest(file: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        ArtifactError: it is damaged, of a newer schema, or says something that cannot be.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: is no JSON ({error})") from error
    if isinstance(value, dict) and value.get("kind") == "triton":
        raise ArtifactError(
            f"{file.parent}: is a package for Triton, which has its adapters inside",
            remedy="Use the artifact that it was made from, and package that again.",
        )
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:  # True equals 1 too
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise ArtifactError(
            f"{file}: schema_version is {version!r}, expected {SCHEMA_VERSION}",
            remedy="Upgrade propulsion-export to read it." if newer else "Export it again.",
        )
    del value["schema_version"]
    try:
        manifest = typing.cast(Manifest, _convert(Manifest, value, "manifest"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{file}: {error}") from error
    if findings := [*_contradictions(manifest), *_misplaced_slots(manifest)]:
        raise ArtifactError(*(f"{file}: {finding}" for finding in findings))
    return manifest


def _contradictions(manifest: Manifest) -> list[str]:
    """What the types allow and no artifact of ours says."""
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
    if (manifest.kind == "engine") != (manifest.engine is not None):
        found.append(f"engine is {manifest.engine!r} in an artifact of kind {manifest.kind!r}")
    if manifest.mode != "folded" and manifest.kind == "merged":
        found.append(f"mode is {manifest.mode!r} in a merged checkpoint, expected 'folded'")
    if manifest.mode == "bank" and manifest.adapters:
        found.append("adapters are told of a bank, expected them in its registry alone")
    if manifest.mode == "switchable":
        found += [
            f"the adapter {name!r} has no file, expected what to feed for it"
            for name, entry in manifest.adapters.items()
            if not entry.file
        ]
    parts = TASKS[manifest.task].architecture == "encoder-decoder"
    several = manifest.kind == "onnx" and parts
    if manifest.graphs.keys() != (set(ENCODER_DECODER_FILES) if several else set()):
        graphs = ", ".join(ENCODER_DECODER_FILES) if several else "none"
        found.append(f"graphs are {', '.join(manifest.graphs) or 'none'}, expected {graphs}")
    if manifest.graphs and (manifest.inputs or manifest.outputs):
        found.append("inputs and outputs are told of an artifact of several graphs, expected none")
    if manifest.mode == "folded" and len(manifest.adapters) > 1:
        found.append(f"{len(manifest.adapters)} adapters are folded in, expected one")
    if manifest.kind == "merged" and not manifest.adapters:
        found.append("no adapter is folded into a merged checkpoint, expected one")
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


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Turn plain JSON values into the annotated type; anything unknown is a ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if kind is Fingerprint:
        return Fingerprint.from_json(value)
    if is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, where)
    if kind is TaskName or origin is Literal:
        known = tuple(TASKS) if kind is TaskName else arguments
        if value not in known:
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(known)}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is None:
        return _expect(value, kind, where)
    return _convert_container(origin, arguments, value, where)


def _convert_container(origin: type, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is dict:
        _expect(value, dict, where)
        return {k: _convert(arguments[1], item, f"{where}.{k}") for k, item in value.items()}
    _expect(value, list, where)
    return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))


def _convert_dataclass(kind: type, value: Any, where: str) -> Any:
    _expect(value, dict, where)
    hints = typing.get_type_hints(kind)
    defaults = {item.name: (item.default, item.default_factory) for item in fields(kind)}
    if unknown := value.keys() - defaults.keys():
        raise ValueError(f"{where} has the unknown field {min(unknown)!r}")
    needed = {name for name, default in defaults.items() if default == (MISSING, MISSING)}
    if lacking := needed - value.keys():
        raise ValueError(f"{where} lacks the field {min(lacking)!r}")
    return kind(**{k: _convert(hints[k], item, f"{where}.{k}") for k, item in value.items()})


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    reason = f"{where} is {value!r}"
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return _convert(kind, value, where)
        except ValueError as error:
            reason = str(error)
    raise ValueError(reason)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, expected {kind.__name__}")
    return value
