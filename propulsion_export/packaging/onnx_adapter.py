"""ONNX Runtime's own adapter files, which its LoraAdapter feeds to a switchable graph."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.file_names import ADAPTERS, ONNX_ADAPTER_SUFFIX
from propulsion_export.errors import UnavailableError, UsageError
from propulsion_export.packaging.copying import copy_artifact_files
from propulsion_export.packaging.layouts import PackageOptions, WritePackage

_VERSION_DIGITS = 7  # hexadecimal: what surely fits a positive int32


def plan(artifact: Artifact, options: PackageOptions) -> WritePackage:
    """Check that an adapter file fits the artifact; return the function that writes the package.

    Raises:
        UsageError: it is no switchable ONNX export of one graph, or in bfloat16.
    """
    del options
    check_has_adapter_files(artifact)

    def write(directory: Path) -> Iterable[str]:
        copy_artifact_files(artifact, artifact.manifest.files, directory)
        return write_adapter_files(artifact, directory)

    return write


def next_command(directory: Path, adapters: Sequence[str]) -> str:
    """The command that uses the package."""
    chosen = f" --adapter {shlex.quote(adapters[0])}" if adapters else ""
    return f"propulsion-export run {shlex.quote(str(directory))}{chosen} --text ..."


def write_adapter_files(artifact: Artifact, directory: Path) -> Iterable[str]:
    """Write `adapters/NAME.onnx_adapter` for each switchable adapter, and the manifest.

    Returns:
        The names of the adapters.
    """
    manifest = artifact.manifest
    base = json.dumps(manifest.base.fingerprint.to_json(), sort_keys=True)
    for name, entry in manifest.adapters.items():
        if entry.file is not None:
            file = directory / ADAPTERS / f"{name}{ONNX_ADAPTER_SUFFIX}"
            write_onnx_adapter(file, artifact.feeds(name), adapter=entry.digest, base=base)
    Artifact.write(directory, manifest)
    return manifest.adapters


def check_has_adapter_files(artifact: Artifact) -> None:
    """Refuse an artifact that takes no adapter files.

    Raises:
        UsageError: it is no switchable ONNX export of one graph, or in bfloat16.
    """
    manifest = artifact.manifest
    if manifest.kind != "onnx" or manifest.mode != "switchable":
        found = f"is of kind {manifest.kind} and {manifest.mode}, expected a switchable ONNX export"
        remedy = "Export with `propulsion-export onnx --mode switchable`."
    elif manifest.graphs:
        found = (
            f"has {len(manifest.graphs)} graphs, expected one: an adapter file feeds one session"
        )
        remedy = "Feed adapters/NAME.safetensors to each of its graphs."
    elif manifest.dtype == "bfloat16":
        found = "is in bfloat16, which ONNX Runtime's adapter files are not written in"
        remedy = "Export with --dtype float32 or float16."
    else:
        return
    raise UsageError(f"{artifact.shown}: {found}", remedy=remedy)


def write_onnx_adapter(file: Path, feeds: Tensors, *, adapter: str, base: str) -> None:
    """Write the inputs of one adapter as ONNX Runtime's own adapter file.

    Args:
        file: the file to write.
        feeds: the adapter's inputs, by name.
        adapter: a text that identifies the adapter, such as a digest; gives its version.
        base: a text that identifies the base model; gives the model's version.

    Raises:
        UnavailableError: onnxruntime is not installed.
    """
    try:
        from onnxruntime import AdapterFormat, OrtValue
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "onnxruntime is not installed", remedy="Run: pip install 'propulsion-export[cpu]'."
        ) from error
    # The values only point at the arrays, which `feeds` keeps until the file is written.
    values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    adapter_file = AdapterFormat()
    adapter_file.set_adapter_version(_version(adapter))
    adapter_file.set_model_version(_version(base))
    adapter_file.set_parameters(values)
    adapter_file.export_adapter(str(file))


def _version(text: str) -> int:
    """A number for a text: all that the format has to identify an adapter and its model."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:_VERSION_DIGITS], 16)
