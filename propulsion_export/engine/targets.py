"""Which TensorRT builds the engine, and for which GPUs."""

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

from propulsion_export.artifacts.manifest import Dtype
from propulsion_export.environment.machine import (
    cuda_devices,
    cuda_reason,
    has_module,
    rtx_targets,
)
from propulsion_export.errors import UnavailableError, UsageError

EngineRuntime = Literal["tensorrt", "tensorrt-rtx"]

AUTO = "auto"
# GeForce RTX 30, 40 and 50: what an engine built ahead of time will most likely meet.
RTX_DEFAULT = ("sm_86", "sm_89", "sm_120")
_EXTRAS: dict[EngineRuntime, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_OLDEST = 75  # TensorRT 10 dropped everything before Turing
_OLDEST_BFLOAT16 = 80


def choose_runtime(requested: str) -> EngineRuntime:
    """Choose what builds: `auto` is tensorrt where it and a GPU are, else tensorrt-rtx.

    Raises:
        UsageError: no such runtime.
        UnavailableError: it is not installed, or tensorrt has no GPU to build on.
    """
    if requested == AUTO:
        return "tensorrt" if has_module("tensorrt") and cuda_devices() else _rtx()
    if requested == "tensorrt-rtx":
        return _rtx()
    if requested != "tensorrt":
        raise UsageError(
            f"--runtime: found {requested!r}, expected one of auto, tensorrt, tensorrt-rtx"
        )
    if not cuda_devices():
        raise UnavailableError(
            f"tensorrt: needs a GPU to build, found none: {cuda_reason()}",
            remedy="Build with --runtime tensorrt-rtx, which needs none, or on a machine with one.",
        )
    _check_installed("tensorrt")
    return "tensorrt"


def load(runtime: EngineRuntime) -> Any:
    """The Python module of a runtime; both have the same builder API."""
    return import_module(runtime.replace("-", "_"))


def choose_targets(
    requested: Sequence[str], runtime: EngineRuntime, dtype: Dtype
) -> tuple[str, ...]:
    """The compute capabilities to build for, in the order requested, each once.

    `auto` is the first GPU of this machine; without one, tensorrt-rtx builds for `RTX_DEFAULT`:
    sm_86, sm_89 and sm_120. tensorrt builds for the GPU it runs on and no other.

    Raises:
        UsageError: no compute capability, one that the runtime does not build for, or one that
            cannot compute in the model's dtype.
    """
    named = tuple(dict.fromkeys(target for item in requested for target in _expand(item)))
    supported = _supported(runtime)
    oldest = _OLDEST_BFLOAT16 if dtype == "bfloat16" else _OLDEST
    wrong = [
        f"--target: found {target}, expected one that {runtime} builds for: {', '.join(supported)}"
        for target in named
        if target not in supported
    ] + [
        f"--target: found {target} for a {dtype} model, expected sm_{oldest} or newer"
        for target in named
        if target in supported and compute_capability(target) < oldest
    ]
    if wrong or not named:
        raise UsageError(
            *wrong or ("--target: found none, expected at least one",),
            remedy="For other GPUs build with --runtime tensorrt on a machine that has one.",
        )
    return named


def compute_capability(target: str) -> int:
    """86 for `sm_86`.

    Raises:
        UsageError: it is not written that way.
    """
    found = re.fullmatch(r"sm_(\d{2,3})", target)
    if not found:
        raise UsageError(
            f"--target: found {target!r}, expected a compute capability such as sm_86, or auto"
        )
    return int(found[1])


def _rtx() -> EngineRuntime:
    _check_installed("tensorrt-rtx")
    return "tensorrt-rtx"


def _check_installed(runtime: EngineRuntime) -> None:
    if not has_module(runtime.replace("-", "_")):
        raise UnavailableError(
            f"{runtime}: is not installed",
            remedy=f"Run: pip install 'propulsion-export[{_EXTRAS[runtime]}]'",
        )


def _expand(target: str) -> tuple[str, ...]:
    if target != AUTO:
        compute_capability(target)
        return (target,)
    devices = cuda_devices()
    return (devices[0].capability,) if devices else RTX_DEFAULT


def _supported(runtime: EngineRuntime) -> tuple[str, ...]:
    if runtime == "tensorrt-rtx":
        return rtx_targets()
    here = [device.capability for device in cuda_devices()[:1]]
    return tuple(target for target in here if compute_capability(target) >= _OLDEST)
