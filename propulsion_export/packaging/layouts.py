"""The one table of server layouts: the module that checks and writes each, and its options.

Adding a layout is one module, one entry here and one test. Its module has
`plan(artifact, options)`, which refuses an artifact that the server cannot run and returns what
writes the package, and `next_command(directory, adapters)`, what to type to use the package.
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
        module: of this package.
        summary: what it takes and who loads it, for `--help`.
        options: fields of `PackageOptions` that it takes.
    """

    module: str
    summary: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackageOptions:
    """Options of some layouts; None where they are not given.

    Attributes:
        model_name: what Triton's clients call the model.
        max_batch_size: the most rows that Triton puts into one batch.
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
    ),
}
