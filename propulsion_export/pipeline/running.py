"""Which runtime runs an artifact, and the artifact as a runner."""

from typing import Literal

from propulsion_export.artifact import Artifact, Runner
from propulsion_export.errors import UsageError
from propulsion_export.machine import cuda_devices

RunnerName = Literal["auto", "torch", "onnxruntime", "onnxruntime-cuda", "reference", "tensorrt"]
_RUNNERS_OF_KIND = {
    "merged": ("torch",),
    "onnx": ("onnxruntime", "onnxruntime-cuda", "reference"),
    "engine": ("tensorrt",),
}
# The reference evaluator computes in Python: larger graphs and longer inputs take minutes.
_REFERENCE_BYTES = 16 * 2**20
REFERENCE_LENGTH = 8


def open_runner(artifact: Artifact, name: str, *, trust_remote_code: bool = False) -> Runner:
    """The artifact as a callable from tensors to tensors.

    Raises:
        UnavailableError: this machine cannot run it.
    """
    from propulsion_export import runners

    if name == "torch":
        import torch

        from propulsion_export.base import load_base

        dtype = getattr(torch, artifact.manifest.dtype)
        merged = load_base(
            str(artifact.directory),
            task=artifact.manifest.task,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        merged.check_complete(())
        return runners.torch_runner(merged.model)
    if name == "reference":
        return runners.reference_runner(artifact.path)
    if name == "tensorrt":
        assert artifact.manifest.engine is not None
        return runners.tensorrt_runner(artifact.path, artifact.manifest.engine.runtime)
    provider = "CUDAExecutionProvider" if name.endswith("cuda") else "CPUExecutionProvider"
    return runners.onnxruntime_runner(artifact.path, provider)


def choose_runner(artifact: Artifact, runner: RunnerName) -> str:
    """The one asked for, if it can run that kind; else what fits the kind and the dtype."""
    possible = _RUNNERS_OF_KIND[artifact.manifest.kind]
    if runner != "auto":
        if runner not in possible:
            raise UsageError(
                f"--runner {runner}: cannot run a {artifact.manifest.kind} artifact, expected "
                f"{' or '.join(possible)}"
            )
        return runner
    if artifact.manifest.kind != "onnx" or artifact.manifest.dtype != "bfloat16":
        return possible[0]
    size = sum(file.stat().st_size for file in artifact.directory.glob("model.onnx*"))
    if cuda_devices():
        return "onnxruntime-cuda"
    return "reference" if size <= _REFERENCE_BYTES else "onnxruntime"
