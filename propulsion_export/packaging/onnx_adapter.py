"""ONNX Runtime's own adapter files, which its LoraAdapter feeds to a switchable graph."""

import hashlib
from pathlib import Path

from propulsion_export.artifact import Artifact, Tensors
from propulsion_export.errors import UnavailableError, UsageError

ADAPTER_SUFFIX = ".onnx_adapter"
_VERSION_DIGITS = 7  # hexadecimal: what surely fits a positive int32


def check_has_adapter_files(artifact: Artifact) -> None:
    """Refuse what no adapter file can be fed to.

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
    raise UsageError(f"{artifact.directory}: {found}", remedy=remedy)


def write_onnx_adapter(file: Path, feeds: Tensors, *, adapter: str, base: str) -> None:
    """Write what to feed for one adapter as ONNX Runtime's own adapter file.

    Args:
        file: to write.
        feeds: by input name.
        adapter: a text that is another for each adapter, such as a digest: its version.
        base: a text that is another for each base model: the model's version.

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
    made = AdapterFormat()
    made.set_adapter_version(_version(adapter))
    made.set_model_version(_version(base))
    made.set_parameters(values)
    made.export_adapter(str(file))


def _version(text: str) -> int:
    """A number for a text, since the format has two numbers and nothing to tell models apart by."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:_VERSION_DIGITS], 16)
