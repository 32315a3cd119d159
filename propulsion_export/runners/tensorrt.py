"""Run a TensorRT or TensorRT-RTX engine through polygraphy."""

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.environment.machine import cuda_devices, cuda_reason
from propulsion_export.errors import ToolError, UnavailableError

# Optimization profiles as in the manifest: by input, its min, opt and max shape.
Profiles = Sequence[Mapping[str, Mapping[str, Sequence[int]]]]


def open_graph(path: Path, artifact: Artifact, device: str) -> Runner:
    """Run the engine of an artifact; see `tensorrt_runner`."""
    del device
    engine = artifact.manifest.engine
    assert engine is not None
    shown = artifact.shown / path.name
    return tensorrt_runner(path, engine.runtime, engine.profiles, shown=shown)


def tensorrt_runner(
    path: Path,
    runtime: Literal["tensorrt", "tensorrt-rtx"],
    profiles: Profiles = (),
    *,
    shown: Path | None = None,
) -> Runner:
    """Run an engine through polygraphy, each time with the first optimization profile that fits.

    Args:
        path: of the engine.
        runtime: what it was built for.
        profiles: those of its manifest.
        shown: the path that messages name it by; default: `path`.

    Raises:
        UnavailableError: there is no GPU, or a package is missing.
        ToolError: raised by the runner when no profile fits the inputs.
    """
    if not cuda_devices():
        raise UnavailableError(
            f"{shown or path}: an engine runs on a GPU only, and {cuda_reason()}"
        )
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
    one_at_a_time = threading.Lock()  # the engine has one execution context

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


def place(array: Array, device: str) -> Any:
    """Put an array into the GPU's memory; feed the returned value in place of it."""
    from polygraphy.cuda import DeviceArray, wrapper

    del device
    placed = DeviceArray(shape=array.shape, dtype=array.dtype)
    # DeviceArray does not free its memory (polygraphy 0.50), and a changed bank is placed anew.
    weakref.finalize(placed, wrapper().free, placed.ptr).atexit = False
    return placed.copy_from(np.ascontiguousarray(array))


def fitting_profile(profiles: Profiles, feeds: Tensors) -> int:
    """The index of the first optimization profile whose ranges contain all shapes.

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
