"""The currency between stages: a directory with one model in one format, and its manifest.

The manifest, `propulsion.json`, says what goes in and what comes out, where every scale sits in the
packed graph inputs, from which base model and adapters the artifact was made and with which tools.
Reading checks all of it, so that nothing downstream has to.
"""

import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from propulsion_export.errors import ArtifactError
from propulsion_export.fingerprint import Fingerprint
from propulsion_export.output import replace_file

# Named arrays: what flows inside a run. A runner is any callable from tensors to tensors.
Tensors = Mapping[str, npt.NDArray[Any]]
Runner = Callable[[Tensors], Tensors]

MANIFEST_FILE = "propulsion.json"
SCHEMA_VERSION = 1
GRAPH_FILE = "model.onnx"
ENGINE_FILE = "model.engine"
ADAPTERS = "adapters"
BASE_NAME = "base"  # no adapter: the base model; no adapter may be called so
BASE_FEEDS = f"{ADAPTERS}/{BASE_NAME}.safetensors"

SCALES_INPUT = "propulsion_scales"
BIASES_INPUT = "propulsion_biases"
MODULES_INPUT = "propulsion_modules"
PACKED_INPUTS = (SCALES_INPUT, BIASES_INPUT, MODULES_INPUT)

Kind = Literal["merged", "onnx", "engine"]
Mode = Literal["folded", "switchable"]
Dtype = Literal["float32", "float16", "bfloat16"]
Side = Literal["output", "input"]


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
    """The base model an artifact was made from: where it lay, and how to recognise it."""

    source: str
    fingerprint: Fingerprint


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
        mode: `folded` (the adapter is in the weights) or `switchable` (its scales are inputs).
        task: such as `text-classification`.
        dtype: of weights and activations.
        layout: by packed input, the slots in it; empty when folded.
        adapters: by name; exactly one when folded.
        files: `sha256:…` by path inside the directory.
    """

    kind: Kind
    mode: Mode
    task: str
    dtype: Dtype
    base: BaseEntry
    adapters: dict[str, AdapterEntry]
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    layout: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    engine: EngineEntry | None = None
    tools: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as JSON text, keys in the order above."""
        value = {"schema_version": SCHEMA_VERSION} | asdict(self)
        value["base"]["fingerprint"] = self.base.fingerprint.to_json()
        return json.dumps(value, indent=2) + "\n"


@dataclass(frozen=True)
class Artifact:
    """A directory and its checked manifest."""

    directory: Path
    manifest: Manifest

    @classmethod
    def read(cls, directory: Path | str) -> Self:
        """Read and check an artifact, digests of all files included.

        Raises:
            ArtifactError: no manifest; it is damaged, of a newer schema or holds an unknown value;
                a path leads out of the directory; a file is missing or not the recorded one.
        """
        directory = Path(directory).expanduser()
        file = directory / MANIFEST_FILE
        if not file.is_file():
            raise ArtifactError(
                f"{directory}: has no {MANIFEST_FILE}, expected a directory written by "
                "`propulsion-export merge`, `onnx` or `trt`"
            )
        manifest = _parse(file)
        _check_files(directory, manifest)
        return cls(directory, manifest)

    @classmethod
    def write(cls, directory: Path, manifest: Manifest) -> Self:
        """Record the digests of all files in `directory` and write the manifest, last of all."""
        written = {
            file.relative_to(directory).as_posix(): digest_of(file)
            for file in sorted(directory.rglob("*"))
            if file.is_file() and file.name != MANIFEST_FILE
        }
        manifest = replace(manifest, files=written)
        replace_file(directory / MANIFEST_FILE, manifest.to_json().encode())
        return cls(directory, manifest)

    @property
    def path(self) -> Path:
        """The model file, or for a merged checkpoint the directory."""
        names = {"onnx": GRAPH_FILE, "engine": ENGINE_FILE, "merged": ""}
        return self.directory / names[self.manifest.kind]

    def feeds(self, adapter: str | None) -> Tensors:
        """What to feed the packed inputs for one adapter by name; `None` or `base`: no adapter.

        Raises:
            ArtifactError: the artifact has no adapter of that name, or its file cannot be read.
        """
        # Registers bfloat16 with numpy, which safetensors needs to load it.
        import ml_dtypes  # noqa: F401
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if self.manifest.mode == "folded":
            only = next(iter(self.manifest.adapters))
            if adapter not in (None, only):
                raise ArtifactError(
                    f"{self.directory}: has the adapter {only!r} folded in, expected no other, got "
                    f"{adapter!r}",
                    remedy="Export with --mode switchable to choose adapters at run time.",
                )
            return {}
        name = BASE_NAME if adapter is None else adapter
        if name != BASE_NAME and name not in self.manifest.adapters:
            known = ", ".join(sorted(self.manifest.adapters))
            raise ArtifactError(
                f"{self.directory}: has no adapter {name!r}, expected one of {BASE_NAME}, {known}",
                remedy="`propulsion-export adapter add` adds one.",
            )
        file = BASE_FEEDS if name == BASE_NAME else self.manifest.adapters[name].file
        if file not in self.manifest.files:
            raise ArtifactError(
                f"{self.directory / MANIFEST_FILE}: files has no {file}, what to feed for {name!r}",
                remedy="Export again.",
            )
        try:
            return dict(load_file(self.directory / file))
        except (SafetensorError, OSError, AttributeError, TypeError, KeyError) as error:
            # The last three are what it does for a dtype that numpy does not have.
            raise ArtifactError(
                f"{self.directory / file}: holds no feeds that can be read ({error})",
                remedy="Copy the whole directory again, or export again.",
            ) from error

    def with_manifest(self, manifest: Manifest) -> Self:
        """Replace the manifest alone, in one step; files keep the digests it names."""
        replace_file(self.directory / MANIFEST_FILE, manifest.to_json().encode())
        return type(self)(self.directory, manifest)


def digest_of(file: Path) -> str:
    """`sha256:…` of a file's content."""
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type of a manifest's dtype; bfloat16 comes from ml_dtypes."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _parse(file: Path) -> Manifest:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: is no JSON ({error})") from error
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
    if (manifest.kind == "engine") != (manifest.engine is not None):
        found.append(f"engine is {manifest.engine!r} in an artifact of kind {manifest.kind!r}")
    if manifest.mode == "switchable" and manifest.kind == "merged":
        found.append("mode is 'switchable' in a merged checkpoint, expected 'folded'")
    if manifest.mode == "folded" and len(manifest.adapters) != 1:
        found.append(f"{len(manifest.adapters)} adapters are folded in, expected one")
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
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(arguments)}")
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


def _check_files(directory: Path, manifest: Manifest) -> None:
    named = [*manifest.files, *(e.file for e in manifest.adapters.values() if e.file)]
    escaping = [
        f"{directory / MANIFEST_FILE}: the path {name!r} leads out of the directory"
        for name in named
        if not _leads_inside(directory, name)
    ]
    if escaping:
        raise ArtifactError(*escaping)
    unrecorded = [name for name in named if name not in manifest.files]
    missing = [name for name in named if not (directory / name).is_file()]
    if unrecorded or missing:
        raise ArtifactError(
            *(f"{directory / name}: is missing" for name in missing),
            *(f"{directory / name}: has no digest in the manifest" for name in unrecorded),
            remedy="Copy the whole directory again, or export again.",
        )
    changed = [
        f"{directory / name}: its content is not what the manifest recorded"
        for name, digest in manifest.files.items()
        if digest_of(directory / name) != digest
    ]
    if changed:
        raise ArtifactError(*changed, remedy="Copy the whole directory again, or export again.")


def _leads_inside(directory: Path, name: str) -> bool:
    """Whether a path, followed to its end, stays in the directory; unusable ones do not."""
    try:
        path = (directory / name).resolve()
        path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
        return False
    return path.is_relative_to(directory.resolve())
