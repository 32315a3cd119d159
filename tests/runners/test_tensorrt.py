"""Engines run with a profile that fits, and only where there is a GPU."""

import gc

import numpy as np
import pytest

from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.runners import tensorrt


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_engine_without_a_gpu_is_unavailable_with_the_reason(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "cuda_devices", lambda: ())
    monkeypatch.setattr(tensorrt, "cuda_reason", lambda: "there is no CUDA driver")

    with pytest.raises(UnavailableError, match="runs on a GPU only, and there is no CUDA driver"):
        tensorrt.tensorrt_runner(tmp_path / "model.engine", runtime)


PREFILL = {
    "tokens": {"min": [1, 1], "opt": [8, 128], "max": [32, 256]},
    "past": {"min": [1, 0], "opt": [8, 0], "max": [32, 0]},
}


DECODING = {
    "tokens": {"min": [1, 1], "opt": [8, 1], "max": [32, 1]},
    "past": {"min": [1, 1], "opt": [8, 64], "max": [32, 255]},
}


PROFILES = (PREFILL, DECODING)


@pytest.mark.parametrize(
    ("tokens", "past", "number"),
    [((2, 9), (2, 0), 0), ((2, 1), (2, 0), 0), ((2, 1), (2, 9), 1), ((32, 1), (32, 255), 1)],
)
def test_first_profile_that_fits_is_taken(tokens, past, number):
    feeds = {"tokens": np.zeros(tokens), "past": np.zeros(past)}

    assert tensorrt.fitting_profile(PROFILES, feeds) == number


@pytest.mark.parametrize(("tokens", "past"), [((2, 9), (2, 9)), ((33, 1), (33, 0))])
def test_shapes_that_no_profile_has_are_refused_with_their_names(tokens, past):
    feeds = {"tokens": np.zeros(tokens), "past": np.zeros(past)}

    with pytest.raises(ToolError, match=r"no profile of the engine has room for tokens \["):
        tensorrt.fitting_profile(PROFILES, feeds)


def test_an_array_on_the_gpu_is_freed_with_the_last_who_uses_it(monkeypatch):
    """Polygraphy leaves that to its user."""
    import polygraphy.cuda

    freed = []

    class Memory:
        """Stands in for the GPU's."""

        def free(self, address):
            freed.append(address)

    class DeviceArray:
        def __init__(self, shape, dtype):
            self.shape, self.ptr = shape, 4096

        def copy_from(self, values):
            return self

    monkeypatch.setattr(polygraphy.cuda, "wrapper", Memory)
    monkeypatch.setattr(polygraphy.cuda, "DeviceArray", DeviceArray)
    placed = tensorrt.place(np.ones((4, 2), np.float32), "cuda")
    gc.collect()
    assert (placed.shape, freed) == ((4, 2), [])

    del placed
    gc.collect()

    assert freed == [4096]
