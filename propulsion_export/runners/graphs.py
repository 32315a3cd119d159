"""Graphs and engines as callables from tensors to tensors."""

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from propulsion_export.artifact import Runner, Tensors
from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.machine import cuda_devices, cuda_reason
from propulsion_export.scales import Array

# Of an engine: by input, its smallest, typical and largest shape; as in the manifest.
Profiles = Sequence[Mapping[str, Mapping[str, Sequence[int]]]]
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_NO_BFLOAT16 = "ONNX Runtime has no bfloat16 kernels for this provider"


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
        reason = _first_line(error)
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
            reason = _first_line(error)
            raise ToolError(f"{path}: cannot be computed of {shapes} ({reason})") from error
        return dict(zip(names, found, strict=True))

    return run


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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


def place_in_onnxruntime(array: Array, device: Literal["cpu", "cuda"]) -> Any:
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


def reference_runner(path: Path) -> Runner:
    """Run an ONNX model in onnx's own evaluator: slow, but it knows every dtype."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path), new_ops=[_gather_elements()])
    known = set(evaluator.input_names)

    def run(inputs: Tensors) -> Tensors:
        feeds = {name: values for name, values in inputs.items() if name in known}
        try:
            outputs = evaluator.run(None, feeds)
        except Exception as error:  # each operator of it has exceptions of its own
            raise UnavailableError(
                f"{path}: onnx's reference evaluator cannot run it ({type(error).__name__}: "
                f"{error})"
            ) from error
        return dict(zip(evaluator.output_names, outputs, strict=True))

    return run


def tensorrt_runner(
    path: Path, runtime: Literal["tensorrt", "tensorrt-rtx"], profiles: Profiles = ()
) -> Runner:
    """Run an engine through polygraphy, each time by the first of its profiles that fits.

    Raises:
        UnavailableError: there is no GPU, or a package is missing.
        ToolError: on running, no profile fits.
    """
    if not cuda_devices():
        raise UnavailableError(f"{path}: an engine runs on a GPU only, and {cuda_reason()}")
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(runtime == "tensorrt-rtx"))
    try:
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    except ModuleNotFoundError as error:
        extra = "rtx" if runtime == "tensorrt-rtx" else "tensorrt"
        raise UnavailableError(
            f"{error.name} is not installed",
            remedy=f"Run: pip install 'propulsion-export[{extra}]'.",
        ) from error
    engine = TrtRunner(EngineFromBytes(BytesFromPath(str(path))))
    engine.activate()
    known = set(engine.get_input_metadata())
    one_at_a_time = threading.Lock()  # it has one execution context

    def run(inputs: Tensors) -> Tensors:
        feeds = {
            name: np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values
            for name, values in inputs.items()
            if name in known
        }
        with one_at_a_time:
            if len(profiles) > 1:
                engine.set_profile(fitting_profile(profiles, feeds))
            return {name: np.array(values) for name, values in engine.infer(feeds).items()}

    return run


def place_for_tensorrt(array: Array) -> Any:
    """Put an array into the GPU's memory; what is returned is fed in place of it."""
    from polygraphy.cuda import DeviceArray, wrapper

    placed = DeviceArray(shape=array.shape, dtype=array.dtype)
    # It does not do so itself (polygraphy 0.50), and banks come and go.
    weakref.finalize(placed, wrapper().free, placed.ptr).atexit = False
    return placed.copy_from(np.ascontiguousarray(array))


def fitting_profile(profiles: Profiles, feeds: Tensors) -> int:
    """The number of the first optimization profile that all shapes lie in.

    Raises:
        ToolError: there is none.
    """
    for number, profile in enumerate(profiles):
        if all(_lies_in(feeds[name].shape, shapes) for name, shapes in profile.items()):
            return number
    shown = ", ".join(f"{name} {list(values.shape)}" for name, values in feeds.items())
    raise ToolError(
        f"no profile of the engine has room for {shown}",
        remedy="Build it for these shapes: --max-shapes.",
    )


def _lies_in(shape: tuple[int, ...], shapes: Mapping[str, Sequence[int]]) -> bool:
    ranges = zip(shapes["min"], shape, shapes["max"], strict=True)
    return all(low <= size <= high for low, size, high in ranges)


def _gather_elements() -> type:
    """GatherElements as ONNX defines it, for the reference evaluator.

    Its own (onnx 1.23) fails with "cannot reshape array" when it picks from more than 64 elements,
    as for RoBERTa's token types. Remove when `tests/runners` says that it no longer does.
    """
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):
        op_domain = ""

        def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
            others = [slice(size) for size in indices.shape]
            others[axis] = slice(None)
            return (np.take_along_axis(data[tuple(others)], indices, axis=axis),)

    return GatherElements
