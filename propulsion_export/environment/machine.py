"""What this machine can do: its GPUs, the installed packages, and the steps they allow.

Reads the CUDA driver and the packages' metadata; torch, which takes seconds to import, is not.
"""

import ctypes
import importlib.metadata
import importlib.util
import platform
import re
from dataclasses import dataclass
from pathlib import Path

_TOOLS = (
    "propulsion-export",
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "optimum",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "safetensors",
    "gguf",
)
# CUdevice_attribute in cuda.h.
_MAJOR, _MINOR = 75, 76
# Smaller numbers in TensorRT's enumeration mean "none" and "this GPU".
_FIRST_CAPABILITY = 10


@dataclass(frozen=True)
class CudaDevice:
    """A GPU: its name, its compute capability such as `sm_86`, its memory in bytes."""

    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Capability:
    """A step, whether it can be done on this machine, the details, and the remedy if it cannot."""

    name: str
    available: bool
    detail: str
    remedy: str = ""


def cuda_devices() -> tuple[CudaDevice, ...]:
    """The GPUs that the CUDA driver shows to this process; none without a driver."""
    return _query_driver()[0]


def cuda_reason() -> str:
    """Why `cuda_devices` is empty; an empty text when it is not."""
    return _query_driver()[1]


def package_version(name: str) -> str | None:
    """The installed version of a distribution such as `onnx-ir`; None when there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    """Whether a top-level module can be imported; a folder of that name is not enough."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def rtx_targets() -> tuple[str, ...]:
    """The compute capabilities that the installed tensorrt-rtx supports; none without it."""
    if not has_module("tensorrt_rtx"):
        return ()
    import tensorrt_rtx

    values = sorted(int(value) for value in tensorrt_rtx.ComputeCapability.__members__.values())
    return tuple(f"sm_{value}" for value in values if value >= _FIRST_CAPABILITY)


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect an artifact."""
    versions = {name: package_version(name) for name in _TOOLS}
    return {"python": platform.python_version()} | {n: v for n, v in versions.items() if v}


def capabilities() -> tuple[Capability, ...]:
    """Each step and whether it can be done here, in the order of the pipeline."""
    devices, reason = _query_driver()
    gpu = ", ".join(f"{device.name} ({device.capability})" for device in devices) or reason
    return (
        _torch(),
        _torch_cuda(bool(devices), gpu),
        _onnxruntime(),
        _package("ONNX reference evaluator", "onnx", "Run: pip install onnx"),
        _tensorrt_rtx(),
        _tensorrt(bool(devices), gpu),
        _run_engines(devices, gpu),
    )


def _query_driver() -> tuple[tuple[CudaDevice, ...], str]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (), "no CUDA driver (libcuda.so.1 not found)"
    if status := driver.cuInit(0):
        return (), f"the CUDA driver finds no usable GPU ({_error_name(driver, status)})"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    devices = tuple(_device(driver, index) for index in range(count.value))
    return devices, "" if devices else "the CUDA driver finds no GPU"


def _error_name(driver: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    return name.value.decode() if name.value else f"CUDA error {status}"


def _device(driver: ctypes.CDLL, index: int) -> CudaDevice:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    capability = f"sm_{major.value}{minor.value}"
    return CudaDevice(name.value.decode(), capability, memory.value)


def _install(extra: str) -> str:
    return f"Run: pip install 'propulsion-export[{extra}]'"


def _package(step: str, distribution: str, remedy: str) -> Capability:
    version = package_version(distribution)
    if version is None:
        return Capability(step, False, f"{distribution} is not installed", remedy)
    return Capability(step, True, f"{distribution} {version}")


def _torch() -> Capability:
    return _package("train, fold and trace with torch", "torch", "Run: pip install torch")


def _torch_cuda(has_gpu: bool, gpu: str) -> Capability:
    step = "torch on CUDA"
    version = _torch_cuda_version()
    if version is None:
        remedy = "Install a CUDA build of torch, see https://pytorch.org/get-started/locally"
        return Capability(step, False, "no torch built for CUDA is installed", remedy)
    if not has_gpu:
        return Capability(step, False, gpu, "Use a machine with an NVIDIA GPU and its driver.")
    return Capability(step, True, f"CUDA {version}, {gpu}")


def _torch_cuda_version() -> str | None:
    """The CUDA version torch was built for, from its version file: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", file.read_text(), re.MULTILINE)
    return found[1] if found else None


def _onnxruntime() -> Capability:
    step = "run ONNX with ONNX Runtime"
    if not has_module("onnxruntime"):
        return Capability(step, False, "onnxruntime is not installed", _install("cpu"))
    import onnxruntime

    providers = ", ".join(onnxruntime.get_available_providers())
    return Capability(step, True, f"onnxruntime {onnxruntime.__version__}: {providers}")


def _tensorrt_rtx() -> Capability:
    step = "build engines with tensorrt-rtx"
    targets = ", ".join(rtx_targets())
    if not targets:
        return Capability(step, False, "tensorrt-rtx is not installed", _install("rtx"))
    return Capability(step, True, f"tensorrt-rtx {package_version('tensorrt-rtx')} for {targets}")


def _tensorrt(has_gpu: bool, gpu: str) -> Capability:
    step = "build engines with tensorrt"
    if not has_module("tensorrt"):
        return Capability(step, False, "tensorrt is not installed", _install("tensorrt"))
    if not has_gpu:
        remedy = "Use a machine with an NVIDIA GPU; tensorrt-rtx builds without one."
        return Capability(step, False, f"it needs a GPU: {gpu}", remedy)
    return Capability(step, True, f"tensorrt {package_version('tensorrt') or ''}, {gpu}")


def _run_engines(devices: tuple[CudaDevice, ...], gpu: str) -> Capability:
    step = "run engines"
    if not devices:
        return Capability(step, False, gpu, "Use a machine with an NVIDIA GPU and its driver.")
    runs = {
        "tensorrt": has_module("tensorrt"),
        "tensorrt-rtx": any(device.capability in rtx_targets() for device in devices),
    }
    runtimes = ", ".join(name for name, can in runs.items() if can)
    if not runtimes:
        extra = "tensorrt" if rtx_targets() else "rtx"
        return Capability(step, False, f"no TensorRT for {gpu} is installed", _install(extra))
    return Capability(step, True, f"{runtimes} on {gpu}")
