"""Shrink a traced graph by rules that change no number, whatever the constants in it.

onnxscript's own list of rules compares constants within a tolerance: it takes x + 1e-8 for x and
x * 1.000005 for x, so that an epsilon in a denominator vanishes and a padded row becomes NaN. It
also folds batch norms into weights in float32 and names the bounds of a clip after its input, where
a second clip overwrites them.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from propulsion_export.environment.quiet import quiet
from propulsion_export.environment.stages import stage

# Rules of onnxscript that look at shapes, axes and types only.
_SHAPE_RULES = (
    "cast_constant_of_shape_rule",
    "cast_constant_of_shape_without_value_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "flatten_to_reshape_rule",
    "materialize_reshape_shape_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "no_op_static_scatter_nd_rule",
    "no_op_transpose_rule",
    "one_reshape_matmul_reshape_rule",
    "reshape_reshape_rule",
    "squeeze_reshape_1d_rule",
    "transpose_transpose_rule",
    "two_reshapes_matmul_reshape_rule",
    "unsqueeze_unsqueeze_rule",
)
TRANSPOSED = ".T"  # behind the name of a weight whose transpose is a constant of its own
_ROUNDS = 2  # folding and rewriting give each other work; onnxscript's own number


def optimise(model: ir.Model) -> ir.Model:
    """Fold constants and remove dead, doubled and idle nodes, in place; returns `model`.

    An input that gets a default value later is no constant yet and stays.
    """
    with quiet(), stage("optimise"):
        from onnxscript.optimizer import fold_constants
        from onnxscript.rewriter import RewritePass

        common.InlinePass()(model)
        _name_transposed(model.graph)
        for _ in range(_ROUNDS):
            fold_constants(model, onnx_shape_inference=True)
            RewritePass(exact_rules())(model)
            common.RemoveUnusedNodesPass()(model)
        _clean_up(model)
    return model


def _name_transposed(graph: ir.Graph) -> None:
    """Keep the parameter's name where the transpose of a small weight is folded to a constant."""
    for node in graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or weight.shape is None:
            continue
        if len(weight.shape) == 2 and len(weight.uses()) == 1:
            node.outputs[0].name = f"{weight.name}{TRANSPOSED}"


def exact_rules() -> Sequence[Any]:
    """The rewrite rules of onnxscript that run: none of them rounds or compares within a tolerance.

    Adding 0 and multiplying by 1 are patterns of our own, because a tolerance is part of a pattern.
    """
    from onnxscript.rewriter import RewriteRule
    from onnxscript.rewriter.pattern import Constant
    from onnxscript.rewriter.rules import common as rules

    zero, one = (Constant(number, rel_tol=0, abs_tol=0) for number in (0, 1))
    patterns = {
        "add_exactly_0": (lambda op, x: x + zero, lambda op, x: zero + x),
        "subtract_exactly_0": (lambda op, x: x - zero,),
        "multiply_by_exactly_1": (lambda op, x: x * one, lambda op, x: one * x),
        "divide_by_exactly_1": (lambda op, x: x / one,),
    }
    idle = [
        RewriteRule(pattern, lambda op, x: op.Identity(x), name=name)
        for name, orders in patterns.items()
        for pattern in orders
    ]
    return [*idle, *(getattr(rules, name) for name in _SHAPE_RULES)]


def _clean_up(model: ir.Model) -> None:
    """Leave one initializer of equal constants, one node of equal nodes, and unique names."""
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)
