"""Run an ONNX model in ONNX Runtime."""

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.artifacts.consistency import differences, inconsistent
from propulsion_export.artifacts.manifest import GraphEntry, TensorSpec
from propulsion_export.artifacts.tensor_names import PRESENT
from propulsion_export.environment.forking import refuse_fork, skip_exit_handlers_in_forks
from propulsion_export.environment.threads import thread_count, too_many_threads
from propulsion_export.environment.waiting import threads_sleep
from propulsion_export.errors import ToolError, UnavailableError, first_line

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
_REMEDIES = {
    "CUDAExecutionProvider": "Run: pip install 'propulsion-export[gpu]'.",
    "DmlExecutionProvider": "Run it where onnxruntime-directml is installed, on Windows.",
    "WebGpuExecutionProvider": "Run it where ONNX Runtime was built with WebGPU.",
}
_DTYPES = {"float": "float32", "double": "float64"}  # the others have the manifest's names
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_NO_BFLOAT16 = "ONNX Runtime has no bfloat16 kernels for this provider"


@dataclass(frozen=True)
class _Placed:
    """An array in the memory where ONNX Runtime computes.

    `array`: the array whose memory it is on the CPU; None if ONNX Runtime made it.
    """

    value: Any
    array: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        del copy  # a runtime's memory is always copied
        array: Array = self.value.numpy() if self.array is None else self.array
        return array if dtype is None else array.astype(dtype)


def open_graph(path: Path, artifact: Artifact, device: str) -> Runner:
    """Run a graph of an artifact on `cpu` or `cuda`; see `onnxruntime_runner`.

    On the `cpu` a graph that was built for another provider runs in that one.

    Raises:
        UnavailableError: ONNX Runtime has no such provider here.
        ArtifactError: the graph has other inputs or outputs than the manifest declares.
    """
    session = _open_session(path, _provider(artifact, device))
    _check_signature(session, path.name, artifact)
    return _runner(session, path)


def open_graph_in_float(path: Path, artifact: Artifact, device: str) -> Runner:
    """Like `open_graph`, but quantised layers compute in floating point.

    The graph on disk stays as it is. For parity alone: a runtime's rounding of activations is a
    thousand times larger than its other errors, and would hide mistakes. So would the sums of
    MatMulNBits in float32, which are several times less exact than those of a MatMul.
    """
    import onnx_ir as ir

    from propulsion_export.graph.files import read_graph
    from propulsion_export.graph.passes.float_layers import ComputeInFloat

    model = read_graph(path.parent, path.name)
    ComputeInFloat()(model)
    with tempfile.TemporaryDirectory(prefix="propulsion-export-") as place:
        copy = Path(place) / path.name
        ir.save(model, copy, external_data=f"{path.name}.data")
        session = _open_session(copy, _provider(artifact, device))
    _check_signature(session, path.name, artifact)
    return _runner(session, path)


def _provider(artifact: Artifact, device: str) -> str:
    built_for = artifact.manifest.execution_provider
    return _PROVIDERS[built_for if device == "cpu" else device]


def onnxruntime_runner(path: Path, provider: str = "CPUExecutionProvider") -> Runner:
    """Run an ONNX model in ONNX Runtime; the session lives as long as the runner.

    It computes with OMP_NUM_THREADS threads, as PyTorch does, at most and by default one per core;
    they wait as OMP_WAIT_POLICY says.

    Raises:
        UnavailableError: onnxruntime is missing, or has no kernel for a node of the graph.
        ToolError: ONNX Runtime cannot load the model; the runner raises it when the model fails.
    """
    return _runner(_open_session(path, provider), path)


def _runner(session: Any, path: Path) -> Runner:
    known = {value.name for value in session.get_inputs()}
    known |= {value.name for value in session.get_overridable_initializers()}
    names = [output.name for output in session.get_outputs()]
    cached = any(name.startswith(f"{PRESENT}.") for name in names)
    process = os.getpid()

    def run(inputs: Tensors) -> Tensors:
        refuse_fork(process, "runner")  # it would wait for threads that the fork does not have
        feeds = {name: values for name, values in inputs.items() if name in known}
        bound = cached or any(isinstance(values, _Placed) for values in feeds.values())
        try:
            found = _run_bound(session, feeds, names) if bound else session.run(names, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in feeds.items())
            raise ToolError(
                f"{path}: the model failed on inputs {shapes} ({first_line(error)})"
            ) from error
        return dict(zip(names, found, strict=True))

    return run


def place(array: Array, device: str) -> Any:
    """Put an array where ONNX Runtime computes; the CPU reads it where it is, without a copy.

    Feed the returned value in place of the array. bfloat16 always stays in the CPU's memory.
    """
    from onnxruntime import OrtValue

    if array.dtype.name == "bfloat16":  # numpy has no such type, so ONNX Runtime takes the bits
        bits = array.view(np.uint16)
        return _Placed(OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16), array)
    return _Placed(OrtValue.ortvalue_from_numpy(array, device, 0), array)


def _open_session(path: Path, provider: str) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "onnxruntime is not installed", remedy="Run: pip install 'propulsion-export[cpu]'."
        ) from error
    skip_exit_handlers_in_forks()
    if provider not in onnxruntime.get_available_providers():
        raise UnavailableError(
            f"ONNX Runtime here has no {provider}, only "
            f"{', '.join(onnxruntime.get_available_providers())}",
            remedy=_REMEDIES.get(provider, ""),
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it would log every optional input to stderr
    # It would keep a memory plan for every combination of shapes it has run, and each adapter
    # that is added changes the shape of the bank.
    options.enable_mem_pattern = False
    # It would start every thread at once, however many.
    options.intra_op_num_threads = thread_count()
    if finding := too_many_threads():
        warnings.warn(finding, stacklevel=2)
    if threads_sleep():
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its exceptions have no public base class
        reason = first_line(error)
        if "NOT_IMPLEMENTED" in reason:
            raise UnavailableError(f"{path}: {_NO_BFLOAT16} ({reason})") from error
        raise ToolError(f"{path}: ONNX Runtime cannot load it ({reason})") from error
    if provider not in session.get_providers():  # it falls back to the CPU without an error
        raise UnavailableError(f"ONNX Runtime cannot start {provider} here")
    return session


def _check_signature(session: Any, name: str, artifact: Artifact) -> None:
    """Refuse a graph whose inputs or outputs the manifest declares otherwise.

    `graph.signature` checks more, before ONNX Runtime loads the graph, but takes long to import.
    """
    manifest = artifact.manifest
    entry = manifest.graphs.get(name) or GraphEntry(manifest.inputs, manifest.outputs)
    optional = [_spec(value, True) for value in session.get_overridable_initializers()]
    inputs = [*(_spec(value) for value in session.get_inputs()), *optional]
    outputs = [_spec(value) for value in session.get_outputs()]
    findings = [
        *differences("input", entry.inputs, inputs),
        *differences("output", entry.outputs, outputs),
    ]
    if findings:
        where = f"{name}: " if manifest.graphs else ""
        raise inconsistent(artifact.shown, [f"{where}{finding}" for finding in findings])


def _spec(value: Any, optional: bool = False) -> TensorSpec:
    """A tensor as in the manifest; ONNX Runtime's type is such as `tensor(float)`."""
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(value.name, _DTYPES.get(dtype, dtype), shape, optional)


def _run_bound(session: Any, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
    """Run with IO binding, which does not copy the arrays that are placed already.

    A cache stays where ONNX Runtime made it, to be fed again in the next step.
    """
    binding = session.io_binding()
    placed = {name: _as_placed(values) for name, values in feeds.items()}
    for name, values in placed.items():
        binding.bind_ortvalue_input(name, values.value)
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    found = zip(outputs, binding.get_outputs(), strict=True)
    return [
        _Placed(value) if name.startswith(f"{PRESENT}.") else value.numpy() for name, value in found
    ]


def _as_placed(values: Any) -> _Placed:
    if isinstance(values, _Placed):
        return values
    placed: _Placed = place(np.ascontiguousarray(values), "cpu")
    return placed
