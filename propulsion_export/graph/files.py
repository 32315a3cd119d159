"""Read and write graphs, their weights in files beside them, so that size is no limit."""

import fcntl
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError

from propulsion_export.artifacts.file_names import GRAPH_FILE, OWN_WEIGHTS_FILE, WEIGHTS_FILE
from propulsion_export.environment.hub_files import leads_inside
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.graph.ir_version import lower_ir_version_

# Shapes and split lengths must be inside the graph: runtimes read them while inferring shapes.
_INLINE_BYTES = 64 * 1024
_FICLONE = 0x40049409  # of linux/fs.h: let a file share the blocks of another


def write_graph(model: ir.Model, directory: Path) -> Path:
    """Write `model.onnx` and its weights as `model.onnx.data`; returns the first."""
    write_graphs({GRAPH_FILE: model}, directory)
    return directory / GRAPH_FILE


def write_graphs(models: Mapping[str, ir.Model], directory: Path) -> None:
    """Write graphs by file name, and the weights of all as `model.onnx.data`.

    A weight used by several graphs, or twice in one, is written once; small ones stay inside. The
    IR version is the lowest that the graph's opset and types allow.
    """
    values = [value for model in models.values() for value in _large_weights(model)]
    _write_weights_(values, directory, WEIGHTS_FILE)
    _save(models, directory)


def write_beside_shared(
    models: Mapping[str, ir.Model], source: Path, directory: Path
) -> tuple[str, ...]:
    """Write graphs whose unchanged weights stay in the files of `source`, which are shared.

    A file is cloned where the file system can, as XFS and Btrfs; else it gets a hard link, which
    the onnx package refuses to load weights from. Weights that are not in a file of `source` go to
    `model.onnx.own.data`.

    Args:
        models: the graphs by file name.
        source: the directory that the graphs were read from.
        directory: where to write, on the same file system.

    Returns:
        The names of the files that are shared.

    Raises:
        UsageError: the files cannot be shared.
    """
    values = [value for model in models.values() for value in _large_weights(model)]
    changed, kept = _by_kind(values)
    names = tuple(dict.fromkeys(str(value.const_value.location) for value in kept))
    for name in names:
        _share(source / name, directory / name)
    for value in kept:
        _refer_(value, value.const_value, directory)
    _write_weights_(changed, directory, OWN_WEIGHTS_FILE)
    _save(models, directory)
    return names


def _by_kind(values: Iterable[ir.Value]) -> tuple[list[ir.Value], list[Any]]:
    """The values whose tensors are in memory, and those whose are in a file."""
    found: tuple[list[ir.Value], list[Any]] = ([], [])
    for value in values:
        found[isinstance(value.const_value, ir.ExternalTensor)].append(value)
    return found


def _share(source: Path, destination: Path) -> None:
    try:
        if not _cloned(source, destination):
            destination.hardlink_to(source.resolve())
    except OSError as error:
        raise UsageError(
            f"--share: {source} cannot be linked from {destination.parent.parent} "
            f"({error.strerror})",
            remedy="Choose an output on the same disk, or leave --share out.",
        ) from error


def _cloned(source: Path, destination: Path) -> bool:
    """Whether the file system has made a copy that shares the blocks of the source."""
    try:
        with source.open("rb") as old, destination.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    except OSError:
        destination.unlink(missing_ok=True)
        return False
    return True


def _write_weights_(values: Sequence[ir.Value], directory: Path, file: str) -> None:
    """Write the values' tensors to a file, equal ones once, and let the values refer to it."""
    digests: dict[int, bytes] = {}
    unique: dict[bytes, Any] = {}
    for value in values:
        digests[id(value)] = key = _digest(value.const_value)
        unique.setdefault(key, value.const_value)
    places = {}
    if unique:
        written = ir.external_data.convert_tensors_to_external(
            list(unique.values()), directory, file
        )
        places = dict(zip(unique, written, strict=True))
    for value in values:
        _refer_(value, places[digests[id(value)]], directory)


def _refer_(value: ir.Value, place: Any, directory: Path) -> None:
    """Let a value's tensor be where `place` is, in a file of `directory`."""
    assert value.const_value is not None
    value.const_value = ir.ExternalTensor(
        place.location,
        place.offset,
        place.length,
        place.dtype,
        shape=value.const_value.shape,  # type: ignore[arg-type]
        name=str(value.name),
        base_dir=directory,
    )


def _save(models: Mapping[str, ir.Model], directory: Path) -> None:
    for name, model in models.items():
        model.producer_name = "propulsion-export"
        lower_ir_version_(model)
        ir.save(model, directory / name)


def read_graph(directory: Path, name: str = GRAPH_FILE) -> ir.Model:
    """Load the graph `name`, its weights left on disk.

    Raises:
        ArtifactError: the file is no ONNX file, or keeps weights outside the directory.
    """
    file = directory / name
    try:
        model = ir.load(file)
    except DecodeError as error:
        raise ArtifactError(f"{file}: is no ONNX file ({error})") from error
    escaping = [
        f"{file}: keeps weights in {location!r}, expected a file inside its directory"
        for location in external_files(model)
        if ".." in Path(location).parts or not leads_inside(directory, location)
    ]
    if escaping:
        raise ArtifactError(*escaping, remedy="Export it again.")
    _read_linked_(model, directory)
    return model


class _LinkedTensor(ir.ExternalTensor):
    """Weights in a file that several artifacts share, or behind a link in a hub's cache.

    onnx_ir 1.1 reads nothing from a file that is linked, lest somebody links a secret file
    into a model's directory (docs/security.md there). `read_graph` has checked where the file is,
    and an artifact has its digest.
    """

    def _check_path_containment(self) -> None:
        pass


def _read_linked_(model: ir.Model, directory: Path) -> None:
    for value in (value for graph in all_graphs(model) for value in graph.initializers.values()):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if _is_linked(directory / tensor.location):
            value.const_value = _LinkedTensor(
                tensor.location,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(value.name),
                base_dir=directory,
            )


def _is_linked(file: Path) -> bool:
    """Whether a file is a link, as in a hub's cache, or one of several hard links."""
    return file.is_file() and (file.is_symlink() or file.stat().st_nlink > 1)


def external_files(model: ir.Model) -> tuple[str, ...]:
    """The files beside the graph that hold its weights."""
    tensors = (
        tensor.location for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)
    )
    return tuple(dict.fromkeys(str(location) for location in tensors))


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The graphs of a model: its own, those inside nodes, and those of functions."""
    yield from model.graphs()
    for function in model.functions.values():
        yield from (function.graph, *function.subgraphs())


def _large_weights(model: ir.Model) -> list[Any]:
    return [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _INLINE_BYTES
    ]


def _digest(tensor: Any) -> bytes:
    """Equal for weights that share their bytes on disk: same bytes and type, whatever the shape."""
    values = np.ascontiguousarray(tensor.numpy())
    key = str(tensor.dtype).encode()
    return hashlib.blake2b(values.view(np.uint8).data, key=key).digest()


def _tensors(model: ir.Model) -> Iterator[Any]:
    for graph in all_graphs(model):
        yield from (value.const_value for value in graph.initializers.values())
        for attribute in (item for node in graph for item in node.attributes.values()):
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value
