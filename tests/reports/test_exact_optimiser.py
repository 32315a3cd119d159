"""A rule that compares constants within a tolerance removes an epsilon: padded rows become NaN."""

import inspect
import re
import sys

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter.pattern import Constant

from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.graph.files import write_graph
from propulsion_export.graph.optimise import exact_rules, optimise
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.runners.onnxruntime import onnxruntime_runner

X = np.array([[1.5, -2.25, 0.0], [0.75, 3.0, 0.0]], np.float32)
NEARLY_NOTHING = [
    ("Add", "x, c", 1e-8, X + np.float32(1e-8)),
    ("Add", "c, x", 1e-12, X + np.float32(1e-12)),
    ("Sub", "x, c", 1e-9, X - np.float32(1e-9)),
    ("Mul", "x, c", 1.000005, X * np.float32(1.000005)),
    ("Mul", "c, x", 0.999995, X * np.float32(0.999995)),
    ("Div", "x, c", 1.0000012, X / np.float32(1.0000012)),
    ("Pow", "x, c", 1.000001, np.abs(X) ** np.float32(1.000001)),
]


def graph(op, inputs, constant, dtype=ir.DataType.FLOAT):
    """`y = op(inputs)` of an input x and a constant c."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["n", 3]))
    y = ir.Value(name="y", type=ir.TensorType(dtype), shape=ir.Shape(["n", 3]))
    c = ir.Value(name="c", const_value=ir.Tensor(np.array(constant, dtype.numpy()), name="c"))
    values = {"x": x, "c": c}
    node = ir.Node("", op, [values[name] for name in inputs.split(", ")], outputs=[y])
    made = ir.Graph([x], [y], nodes=[node], initializers=[c], opset_imports={"": 18}, name="one")
    return ir.Model(made, ir_version=8)


def operators(model):
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(("op", "inputs", "constant", "expected"), NEARLY_NOTHING)
def test_a_constant_near_0_or_1_still_acts(tmp_path, op, inputs, constant, expected):
    model = optimise(graph(op, inputs, constant))

    write_graph(model, tmp_path)

    x = np.abs(X) if op == "Pow" else X
    result = onnxruntime_runner(tmp_path / GRAPH_FILE)({"x": x})["y"]
    assert operators(model) == [op]
    np.testing.assert_allclose(result, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("op", "inputs", "constant"),
    [
        ("Add", "x, c", 0),
        ("Add", "c, x", 0),
        ("Sub", "x, c", 0),
        ("Mul", "x, c", 1),
        ("Mul", "c, x", 1),
        ("Div", "x, c", 1),
    ],
)
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT64"])
def test_exactly_0_and_1_are_removed(op, inputs, constant, dtype):
    model = optimise(graph(op, inputs, constant, ir.DataType[dtype]))

    assert operators(model) == ["Identity"]


def test_a_subtraction_from_zero_and_a_division_of_one_stay():
    assert operators(optimise(graph("Sub", "c, x", 0.0))) == ["Sub"]
    assert operators(optimise(graph("Div", "c, x", 1.0))) == ["Div"]


def test_two_clips_of_one_value_keep_their_bounds(tmp_path):
    model = optimise(
        ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 18]>
        graph (float[n, 3] x) => (float[n, 3] y)
        <float a = {-1.0}, float b = {1.0}, float c = {-2.0}, float d = {2.0}> {
            low = Max (x, a)
            near = Min (low, b)
            deep = Max (x, c)
            far = Min (deep, d)
            y = Add (near, far)
        }
    """)
    )

    write_graph(model, tmp_path)

    result = onnxruntime_runner(tmp_path / GRAPH_FILE)({"x": X})["y"]
    np.testing.assert_array_equal(result, X.clip(-1, 1) + X.clip(-2, 2))


def zero_padding(model):
    """Padding is a row of zeros in the embedding, as PyTorch initialises it, and stays one."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight[0] = 0
    return model


@pytest.fixture
def llama(tmp_path, tiny_tokenizer):
    """A classifier whose norm of a padded row is 0 / sqrt(0 + 1e-9)."""
    import torch
    from tiny_models import LABELS, make_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    settings = make_model("llama").config.to_dict()
    settings |= {"rms_norm_eps": 1e-9, "id2label": dict(enumerate(LABELS))}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**settings)).eval()
    zero_padding(model).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def test_a_padded_batch_through_an_export_with_a_tiny_epsilon_is_finite(llama, tmp_path):
    import torch

    model, base = llama
    export_onnx([], tmp_path / "out", model=str(base), mode="folded")
    ids = np.array([[7, 8, 9, 10], [11, 12, 0, 0]])
    mask = (ids != 0).astype(np.int64)

    run = onnxruntime_runner(tmp_path / "out" / GRAPH_FILE)
    logits = run({"input_ids": ids, "attention_mask": mask})["logits"]

    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask)).logits.numpy()
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def pattern_constants(rule):
    nodes = list(rule._target_pattern)
    return [value for node in nodes for value in node.inputs if isinstance(value, Constant)]


def source_of(rule):
    """The source of the module that decides whether the rule applies."""
    decides = rule._condition_function
    return inspect.getsource(sys.modules[decides.__module__]) if decides else ""


TOLERANT = re.compile(r"is_?close|tol\b|tol=|tolerance|np\.round|around\(")


def test_no_rule_that_runs_has_a_tolerance():
    for rule in exact_rules():
        for constant in pattern_constants(rule):
            # The [-1] of a shape is a list of whole numbers, which no tolerance below 1 mixes up.
            exact = constant._rel_tol == constant._abs_tol == 0 or constant.value == [-1]
            assert exact, f"{rule.name}: matches {constant} within a tolerance"
        assert not TOLERANT.search(source_of(rule)), f"{rule.name}: decides within a tolerance"


def test_the_check_finds_the_tolerant_rules_of_onnxscript():
    from onnxscript.rewriter.rules.common import add_0_rule, fuse_hardswish_rules

    assert [constant._abs_tol for constant in pattern_constants(add_0_rule)] == [1e-8]
    assert any(TOLERANT.search(source_of(rule)) for rule in fuse_hardswish_rules().rules)


# Rules of onnxscript's own list that do not run: one that rounds differently, one that compares
# numbers within a tolerance, those that fold weights in float32 or lose the bounds of a clip, one
# that compares all pairs of nodes, and those of convolutions.
LEFT_OUT = (
    "CastCast",
    "ScatterAllDynamic",
    "FuseBatchNorm",
    "FuseSuccessive",
    "FuseMinMaxToClip",
    "FuseMaxMinToClip",
    "SlicesSplit",
    "FuseConv",
    "NormalizePad",
    "RemoveOptionalBias",
)


def test_every_rule_of_the_installed_onnxscript_is_known():
    """A new rule is looked at before it may run."""
    from onnxscript.rewriter import _DEFAULT_REWRITE_RULES

    running = {id(rule) for rule in exact_rules()}
    others = [rule for rule in _DEFAULT_REWRITE_RULES if id(rule) not in running]
    unknown = [rule for rule in others if not (rule.name or "").startswith(LEFT_OUT)]

    # The rules without a name: adding 0, multiplying by 1, and dropout, which evaluation has not.
    operators = sorted(node.op_type for rule in unknown for node in rule._target_pattern)
    assert operators == ["Add", "Add", "Div", "Dropout", "Dropout", "Mul", "Mul", "Sub"]
