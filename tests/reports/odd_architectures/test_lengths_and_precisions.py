"""Lengths that a trace fixes, and precisions that a model or a graph brings along."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from odd_models import NAMES, make

from propulsion_export.errors import BaseModelError, ToolError
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.passes.float32_detours import ComputeInFloat32
from propulsion_export.graph.trace import _refuse_bounded, _refuse_fixed
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners.onnxruntime import onnxruntime_runner

# Lengths that a trace fixes


def program(shape, ranges=""):
    value = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(shape))
    graph = ir.Graph([value], [value], nodes=[], opset_imports={"": 20})
    graph.metadata_props["pkg.torch.export.ExportedProgram.range_constraints"] = ranges
    return ir.Model(graph, ir_version=9)


@pytest.mark.parametrize("shape", [["s1", 11], [3, "s2"], ["s1", "8*s2"]])
def test_a_fixed_length_and_a_multiple_are_no_length_that_varies(shape):
    with pytest.raises(ToolError, match="input_ids is traced as"):
        _refuse_fixed(program(shape), "Model", {"input_ids": {0: None, 1: None}})


@pytest.mark.parametrize(
    ("ranges", "found"),
    [
        ("{s1: VR[2, int_oo], s2: VR[9, int_oo]}", "9 to inf"),
        ("{s1: VR[2, int_oo], s2: VR[2, 16]}", "2 to 16"),
        ("{s1: VR[2, int_oo], s2: VR[2, 40]}", None),
        ("{s1: VR[2, int_oo], s2: VR[3, int_oo]}", None),
        ("", None),
    ],
)
def test_a_graph_of_one_branch_is_refused(ranges, found):
    model = make("SqueezeBert", "Model")

    if found is None:
        _refuse_bounded(program(["s1", "s2"], ranges), model, ["input_ids"])
        return
    with pytest.raises(ToolError, match=f"SqueezeBertModel: is traced for {found} tokens"):
        _refuse_bounded(program(["s1", "s2"], ranges), model, ["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_funnel_which_pools_lengths_is_refused_while_exporting(checkpoint, tmp_path, head):
    task = "text-classification" if head.startswith("ForSeq") else "token-classification"
    _, adapter = checkpoint("Funnel", head, task, **NAMES)

    with pytest.raises(ToolError, match=f"Funnel{head}: input_ids is traced as"):
        export_onnx([adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# An oracle in float64


def test_a_model_that_fills_its_mask_with_the_lowest_float64_has_an_oracle(checkpoint, tmp_path):
    _, adapter = checkpoint("XGLM", "ForCausalLM", "text-generation")
    merge(adapter, tmp_path / "merged", untie=True)

    report = check_parity(tmp_path / "merged")

    assert report.passed
    assert torch.get_default_dtype() is torch.float32


def test_a_model_without_float64_is_refused_in_words(checkpoint, tmp_path, monkeypatch):
    _, adapter = checkpoint("Llama", "ForCausalLM", "text-generation")
    merge(adapter, tmp_path / "merged", untie=True)
    forward = transformers.LlamaModel.forward

    def only_float32(self, *arguments, **named):
        if self.embed_tokens.weight.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return forward(self, *arguments, **named)

    monkeypatch.setattr(transformers.LlamaModel, "forward", only_float32)

    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM: does not run in float64 .*Double"):
        check_parity(tmp_path / "merged")


# Precisions that a graph brings along


STRAY = """
<ir_version: 9, opset_import: ["" : 20]>
graph (float[n, 2] x, float[2] slopes) => (float[n, 2] y, bool[n, 2] z) {
    low = Cast <to = 16> (x)
    slope = Cast <to = 16> (slopes)
    product = Mul (low, slope)
    total = Sub (product, slope)
    z = Less (total, low)
    y = Cast <to = 1> (total)
}
"""


def test_bfloat16_inside_a_float32_graph_is_computed_as_torch_does(tmp_path):
    model = ir.from_onnx_text(STRAY)
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.BFLOAT16 if value.dtype is None else value.dtype

    ComputeInFloat32()(model)

    write_graphs({"model.onnx": model}, tmp_path)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 100
    slopes = torch.tensor([0.25, 0.0039])
    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": x.numpy(), "slopes": slopes.numpy()})
    low, slope = x.bfloat16(), slopes.bfloat16()
    expected = low * slope - slope
    np.testing.assert_array_equal(found["y"], expected.float().numpy())
    np.testing.assert_array_equal(found["z"], (expected < low).numpy())
    kept = [node for node in model.graph if node.op_type in ("Mul", "Sub", "Less")]
    assert {v.dtype for node in kept for v in node.inputs} == {ir.DataType.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
@pytest.mark.parametrize("kind", ["Falcon", "XGLM"])
def test_decoders_with_odd_positions_pass_parity(checkpoint, tmp_path, kind, mode):
    _, adapter = checkpoint(kind, "ForCausalLM", "text-generation")

    export_onnx([adapter], tmp_path / "out", mode=mode, untie=mode == "folded")

    assert check_parity(tmp_path / "out").passed
