"""What a caller may ask of an engine, and what of it is possible here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from propulsion_export.artifacts.manifest import Mode
from propulsion_export.engine.profiles import Shapes
from propulsion_export.engine.targets import AUTO, EngineRuntime
from propulsion_export.environment.machine import cuda_devices, cuda_reason
from propulsion_export.errors import UnavailableError, UsageError

_LEVELS = range(6)


@dataclass(frozen=True)
class BuildOptions:
    """How to build; every field is an option of `propulsion-export trt`.

    Attributes:
        runtime: `auto` is tensorrt where it and a GPU are, else tensorrt-rtx.
        targets: compute capabilities such as `sm_86`; `auto` is this machine's GPU.
        min_shapes: by input name; what is not given is filled in, see `choose_profiles`.
        opt_shapes: the same for the shapes the engine is to be best at.
        max_shapes: the same for the largest.
        refit: `scales` builds the scales of a switchable artifact in as weights that can be
            replaced later, in place of an input; of a bank all its rows.
        bank: `constant` builds in the rows that a bank has now, in place of an input, for servers
            whose requests cannot bring it; adapters added later need another build. None is
            `input`.
        timing_cache: a file that makes the next build faster; read where it exists, then written.
        builder_optimization_level: 0 (fast build) to 5 (long search).
        version_compatible: the engine also runs in later versions of TensorRT.
        hardware_compatibility: `ampere+` or `same-cc`: the engine also runs on other GPUs.
        strip_weights: leave the weights out; whoever loads the engine refits it from the ONNX.
        workspace: scratch memory on the GPU in MiB.
    """

    runtime: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    targets: tuple[str, ...] = (AUTO,)
    min_shapes: Shapes = field(default_factory=dict)
    opt_shapes: Shapes = field(default_factory=dict)
    max_shapes: Shapes = field(default_factory=dict)
    refit: Literal["none", "scales"] = "none"
    bank: Literal["input", "constant"] | None = None
    timing_cache: Path | None = None
    builder_optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere+", "same-cc"] = "none"
    strip_weights: bool = False
    workspace: int | None = None

    def recorded(self) -> Mapping[str, Any]:
        """The options that the manifest records; shapes and targets have their own fields."""
        return {
            "refit": self.refit,
            "bank": self.bank or "input",
            "builder_optimization_level": self.builder_optimization_level,
            "version_compatible": self.version_compatible,
            "hardware_compatibility": self.hardware_compatibility,
            "strip_weights": self.strip_weights,
            "workspace": self.workspace,
        }


def check_options(options: BuildOptions, runtime: EngineRuntime, mode: Mode) -> None:
    """Refuse before the build what it could not do.

    Raises:
        UsageError: a value out of range, or options that exclude each other.
        UnavailableError: `runtime` has no such option, or needs a GPU for it and there is none.
    """
    if wrong := _contradictions(options, mode):
        raise UsageError(*wrong)
    if runtime == "tensorrt-rtx":
        _check_rtx(options)


def _contradictions(options: BuildOptions, mode: Mode) -> list[str]:
    level, workspace = options.builder_optimization_level, options.workspace
    cache = options.timing_cache
    wrong = {
        f"--timing-cache: found the directory {cache}, expected a file": (
            cache is not None and cache.is_dir()
        ),
        f"--builder-optimization-level: found {level}, expected 0 to 5": (
            level is not None and level not in _LEVELS
        ),
        f"--workspace: found {workspace}, expected MiB, at least 1": (
            workspace is not None and workspace < 1
        ),
        "--refit scales: found a folded artifact, expected one exported with --mode switchable": (
            options.refit == "scales" and mode == "folded"
        ),
        f"--bank {options.bank}: found a {mode} artifact, expected one exported with --mode bank": (
            options.bank is not None and mode != "bank"
        ),
        "--bank: does nothing with --refit scales, which builds a bank's rows in": (
            options.bank is not None and options.refit == "scales" and mode == "bank"
        ),
        "--strip-weights: found --refit scales too, expected one of them": (
            options.refit == "scales" and options.strip_weights
        ),
    }
    return [finding for finding, applies in wrong.items() if applies]


def _check_rtx(options: BuildOptions) -> None:
    never = {
        "--timing-cache": options.timing_cache is not None,
        "--hardware-compatibility": options.hardware_compatibility != "none",
    }
    if missing := [option for option, asked in never.items() if asked]:
        raise UnavailableError(
            *(
                f"{option}: tensorrt-rtx has no such option, expected tensorrt"
                for option in missing
            ),
            remedy="Build with --runtime tensorrt on a machine with a GPU, or without it.",
        )
    on_gpu = {
        "--refit scales": options.refit != "none",
        "--strip-weights": options.strip_weights,
        "--version-compatible": options.version_compatible,
    }
    needing = [option for option, asked in on_gpu.items() if asked]
    if needing and not cuda_devices():
        raise UnavailableError(
            *(
                f"{option}: needs a GPU at build time, found none: {cuda_reason()}"
                for option in needing
            ),
            remedy="Build on a machine with a GPU, or without the option.",
        )
