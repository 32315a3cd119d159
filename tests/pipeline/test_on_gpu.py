"""What only a GPU can show; `make gpu` runs it. Nothing here has been run yet without one."""

import pytest

from propulsion_export.engine import BuildOptions
from propulsion_export.environment.machine import cuda_devices, cuda_reason
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.trt import build_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda_devices(), reason=cuda_reason() or "a GPU is here"),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_an_engine_passes_parity(mode, dtype, world, tmp_path):
    export_onnx([world.three], tmp_path / "onnx", mode=mode, dtype=dtype)
    build_engine(tmp_path / "onnx", tmp_path / "engine", BuildOptions())

    report = check_parity(tmp_path / "engine")

    assert report.passed, [check.detail for check in report.checks] or report.not_run


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_graph_passes_parity_in_onnx_runtime_on_cuda(dtype, world, tmp_path):
    export_onnx([world.three], tmp_path / "onnx", mode="switchable", dtype=dtype)

    report = check_parity(tmp_path / "onnx", runner="onnxruntime-cuda")

    assert report.passed, [check.detail for check in report.checks] or report.not_run
