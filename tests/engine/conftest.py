"""Tiny ONNX artifacts, and machines with and without a GPU."""

import pytest
from text_artifacts import artifact, folded, graph, switchable

from propulsion_export.engine import options, targets
from propulsion_export.environment.machine import CudaDevice

__all__ = ["artifact", "folded", "graph", "switchable"]


@pytest.fixture
def out(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
def machine_with(monkeypatch):
    """Pretend that this machine has GPUs of these compute capabilities, or none."""

    def pretend(*capabilities):
        devices = tuple(CudaDevice("some GPU", name, 2**34) for name in capabilities)
        for module in (options, targets):
            monkeypatch.setattr(module, "cuda_devices", lambda: devices)
            monkeypatch.setattr(module, "cuda_reason", lambda: "no CUDA driver")

    return pretend


@pytest.fixture
def installed(monkeypatch):
    """Pretend that of TensorRT these modules are installed and no others."""

    def pretend(*modules):
        monkeypatch.setattr(targets, "has_module", lambda name: name in modules)

    return pretend
