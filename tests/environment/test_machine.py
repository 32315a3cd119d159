import ctypes
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest

from propulsion_export.environment import machine
from propulsion_export.environment.machine import (
    CudaDevice,
    capabilities,
    cuda_devices,
    cuda_reason,
    has_module,
    package_version,
    rtx_targets,
    tool_versions,
)

ATTRIBUTES = {75: 8, 76: 6}


class FakeDriver:
    """Two GPUs of compute capability 8.6, or none with `status` for a reason."""

    def __init__(self, status=0, count=2):
        self.status, self.count = status, count

    def cuInit(self, flags):
        return self.status

    def cuGetErrorName(self, status, name):
        name._obj.value = b"CUDA_ERROR_NO_DEVICE" if status == 100 else None

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count

    def cuDeviceGet(self, device, index):
        device._obj.value = index

    def cuDeviceGetName(self, name, length, device):
        name.value = f"GPU {device.value}".encode()

    def cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = 24 * 2**30

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = ATTRIBUTES[attribute]


@pytest.fixture
def driver(monkeypatch):
    real = ctypes.CDLL

    def pretend(found):
        def load(name, *arguments, **options):
            if name != "libcuda.so.1":  # tensorrt_rtx loads its own libraries when it is imported
                return real(name, *arguments, **options)
            if found is None:
                raise OSError
            return found

        monkeypatch.setattr(ctypes, "CDLL", load)

    return pretend


def test_gpus_are_described_as_the_driver_does(driver):
    driver(FakeDriver())

    expected = tuple(CudaDevice(f"GPU {index}", "sm_86", 24 * 2**30) for index in range(2))
    assert cuda_devices() == expected
    assert cuda_reason() == ""


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        pytest.param(None, "no CUDA driver", id="no-driver"),
        pytest.param(FakeDriver(status=100), "CUDA_ERROR_NO_DEVICE", id="no-device"),
        pytest.param(FakeDriver(status=803), "CUDA error 803", id="unnamed"),
        pytest.param(FakeDriver(count=0), "finds no GPU", id="none"),
    ],
)
def test_without_a_gpu_there_is_a_reason(driver, found, reason):
    driver(found)

    assert cuda_devices() == ()
    assert reason in cuda_reason()


def test_versions_are_those_installed():
    versions = tool_versions()

    assert versions["python"] == platform.python_version()
    assert versions["torch"] == version("torch")
    assert versions["propulsion-export"] == version("propulsion-export")
    assert all(versions.values())


def test_what_is_not_installed_has_no_version():
    assert package_version("no-such-package-here") is None
    assert not has_module("no_such_module_here")


def test_a_folder_is_no_module(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_like").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    assert not has_module("tensorrt_like")


def by_name():
    return {capability.name: capability for capability in capabilities()}


def test_a_machine_without_a_gpu_cannot_run_engines_and_is_told_why(driver):
    driver(None)

    found = by_name()

    assert not found["run engines"].available
    assert "no CUDA driver" in found["run engines"].detail
    assert not found["build engines with tensorrt"].available


def test_tensorrt_rtx_builds_without_a_gpu(driver):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    driver(None)

    found = by_name()["build engines with tensorrt-rtx"]

    assert found.available
    assert "sm_86" in found.detail


@pytest.mark.parametrize(("minor", "available"), [(6, True), (2, False)])
def test_engines_run_only_on_gpus_that_an_installed_runtime_knows(
    driver, monkeypatch, minor, available
):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    monkeypatch.setitem(ATTRIBUTES, 76, minor)
    monkeypatch.setattr(machine, "has_module", lambda name: name == "tensorrt_rtx")
    driver(FakeDriver())

    assert by_name()["run engines"].available is available


def test_everything_that_is_missing_has_a_remedy(driver, monkeypatch):
    driver(None)
    monkeypatch.setattr(machine, "has_module", lambda name: False)
    monkeypatch.setattr(machine, "package_version", lambda name: None)
    monkeypatch.setattr(machine, "_torch_cuda_version", lambda: None)

    found = capabilities()

    assert not any(capability.available for capability in found)
    assert all(capability.detail and capability.remedy for capability in found)


def test_sm_90_is_no_target_of_tensorrt_rtx():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")

    assert "sm_86" in rtx_targets()
    assert "sm_90" not in rtx_targets()


def test_asking_does_not_load_torch():
    code = (
        "import sys; from propulsion_export.environment.machine import capabilities; "
        "capabilities(); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )

    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert answer.stdout.strip() == "[]"
