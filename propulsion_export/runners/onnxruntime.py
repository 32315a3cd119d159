"""Run an ONNX model in ONNX Runtime."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.errors import ToolError, UnavailableError, first_line

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_NO_BFLOAT16 = "ONNX Runtime has no bfloat16 kernels for this provider"


def open_graph(path: Path, artifact: Artifact, device: str) -> Runner:
    """Run a graph of an artifact on `cpu` or `cuda`; see `onnxruntime_runner`."""
    del artifact
    return onnxruntime_runner(path, _PROVIDERS[device])


def onnxruntime_runner(path: Path, provider: str = "CPUExecutionProvider") -> Runner:
    """Run an ONNX model in ONNX Runtime; the session lives as long as the runner.

    It computes with OMP_NUM_THREADS threads, as PyTorch does; without that with one a core.

    Raises:
        UnavailableError: onnxruntime is missing, or has no kernel for a node of the graph.
        ToolError: it cannot load the model; on running, it cannot compute what it is fed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "onnxruntime is not installed", remedy="Run: pip install 'propulsion-export[cpu]'."
        ) from error
    if provider not in onnxruntime.get_available_providers():
        raise UnavailableError(
            f"ONNX Runtime here has no {provider}, only "
            f"{', '.join(onnxruntime.get_available_providers())}",
            remedy="Run: pip install 'propulsion-export[gpu]'.",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it tells of every optional input, on stderr
    # It would keep a plan of the memory for every combination of shapes there ever was, and each
    # adapter that is added makes the bank another shape.
    options.enable_mem_pattern = False
    options.intra_op_num_threads = _threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its exceptions have no public base class
        reason = first_line(error)
        if "NOT_IMPLEMENTED" in reason:
            raise UnavailableError(f"{path}: {_NO_BFLOAT16} ({reason})") from error
        raise ToolError(f"{path}: ONNX Runtime cannot load it ({reason})") from error
    known = {value.name for value in session.get_inputs()}
    known |= {value.name for value in session.get_overridable_initializers()}
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Tensors) -> Tensors:
        feeds = {name: values for name, values in inputs.items() if name in known}
        bound = any(isinstance(values, _Placed) for values in feeds.values())
        try:
            found = _run_bound(session, feeds, names) if bound else session.run(names, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in feeds.items())
            reason = first_line(error)
            raise ToolError(f"{path}: cannot be computed of {shapes} ({reason})") from error
        return dict(zip(names, found, strict=True))

    return run


def _threads() -> int:
    """What OMP_NUM_THREADS says, of a list the first; 0, the runtime's own choice, without it."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


@dataclass(frozen=True)
class _Placed:
    """An array where ONNX Runtime computes, which on the CPU points at `array`."""

    value: Any
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def place(array: Array, device: str) -> Any:
    """Put an array where ONNX Runtime computes; the CPU reads it where it is, without a copy.

    What is returned is fed in place of the array. One of bfloat16 always stays in the CPU's memory.
    """
    from onnxruntime import OrtValue

    if array.dtype.name == "bfloat16":  # which numpy has not, so ONNX Runtime takes its bits
        bits = array.view(np.uint16)
        return _Placed(OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16), array)
    return _Placed(OrtValue.ortvalue_from_numpy(array, device, 0), array)


def _run_bound(session: Any, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Array]:
    """Run with IO binding, so that nothing is copied that already is where it is computed with."""
    binding = session.io_binding()
    for name, values in feeds.items():
        if isinstance(values, _Placed):
            binding.bind_ortvalue_input(name, values.value)
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()  # type: ignore[no-any-return]
