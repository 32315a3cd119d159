"""The one table of server layouts: the module that checks and writes each, and its options.

Adding a layout is one module, one entry here and one test. Its module has
`plan(artifact, options)`, which refuses an artifact that the server cannot run and returns the
function that writes the package, and `next_command(directory, adapters)`, the command that uses it.
Reading this table imports none of them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# Writes a package into an empty directory, its manifest included; returns the adapters in it.
WritePackage = Callable[[Path], Iterable[str]]


@dataclass(frozen=True)
class ServerLayout:
    """One layout.

    Attributes:
        module: the module of this package that writes it.
        summary: the artifact it takes and the server that loads it, for `--help`.
        options: the fields of `PackageOptions` that it uses.
        kind: what the manifest of a package says.
    """

    module: str
    summary: str
    options: tuple[str, ...] = ()
    kind: str = "onnx"


@dataclass(frozen=True)
class PackageOptions:
    """Options of some layouts; None: not given.

    Attributes:
        model_name: the name of the model in Triton.
        max_batch_size: the largest number of rows that Triton puts into one batch.
    """

    model_name: str | None = None
    max_batch_size: int | None = None


LAYOUTS = {
    "genai": ServerLayout("genai", "a causal language model for onnxruntime-genai"),
    "onnx-adapter": ServerLayout(
        "onnx_adapter", "a switchable export for ONNX Runtime's LoraAdapter"
    ),
    "triton": ServerLayout(
        "triton",
        "a bank, a folded export or an engine for Triton",
        options=("model_name", "max_batch_size"),
        kind="triton",
    ),
}
