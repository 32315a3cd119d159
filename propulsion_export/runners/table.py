"""The one table of runtimes: which kinds of artifact each runs, and the module that does it.

Adding a runtime is one module, one entry here and one test. A module that runs graphs has
`open_graph(path, artifact, device)`, which returns a runner, and `place(array, device)`, which puts
an array where the runtime computes. The module that runs checkpoints has `open_checkpoint`.
Reading this table imports none of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        module: the module of this package that runs artifacts in it.
        kind: the kind of artifact that it runs.
        device: where it computes, `cpu` or `cuda`.
    """

    module: str
    kind: str
    device: str = "cpu"


# The first runtime of a kind is its default.
RUNTIMES = {
    "torch": Runtime("pytorch", "merged"),
    "onnxruntime": Runtime("onnxruntime", "onnx"),
    "onnxruntime-cuda": Runtime("onnxruntime", "onnx", device="cuda"),
    "reference": Runtime("reference", "onnx"),
    "tensorrt": Runtime("tensorrt", "engine", device="cuda"),
}
RUNNER_NAMES = ("auto", *RUNTIMES)


def runtimes_of(kind: str) -> tuple[str, ...]:
    """The names of the runtimes that run a kind of artifact, the default first."""
    return tuple(name for name, runtime in RUNTIMES.items() if runtime.kind == kind)
