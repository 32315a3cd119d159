"""The last steps on a graph: optimise it, give inputs their defaults, read its signature."""

import onnx_ir as ir

from propulsion_export.artifact import Tensors
from propulsion_export.manifest import TensorSpec
from propulsion_export.quiet import quiet


def optimise(model: ir.Model) -> ir.Model:
    """Fold constants and remove dead or doubled nodes, with onnxscript's optimiser."""
    with quiet():
        import onnxscript.optimizer

        return onnxscript.optimizer.optimize(model)  # type: ignore[no-any-return]


class SetDefaults(ir.passes.InPlacePass):
    """Make graph inputs optional: an initializer of the same name is their default."""

    def __init__(self, defaults: Tensors) -> None:
        super().__init__()
        self.defaults = defaults

    def requires(self, model: ir.Model) -> None:
        inputs = {value.name: value for value in model.graph.inputs}
        for name, values in self.defaults.items():
            if name not in inputs:
                raise ir.passes.PreconditionError(f"{name}: is no input, so it has no default")
            shape, dtype = inputs[name].shape, inputs[name].dtype
            if shape != values.shape or dtype != ir.DataType.from_numpy(values.dtype):
                raise ir.passes.PreconditionError(
                    f"{name}: the default is {values.dtype} of shape {list(values.shape)}, the "
                    f"input {dtype} of shape {shape}"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in list(model.graph.inputs):
            if value.name is not None and value.name in self.defaults:
                value.const_value = ir.tensor(self.defaults[value.name], name=value.name)
                model.graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=bool(self.defaults))


def signature(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The graph's inputs and outputs; an input that has an initializer is optional."""
    graph = model.graph
    inputs = tuple(_spec(value, value.name in graph.initializers) for value in graph.inputs)
    return inputs, tuple(_spec(value) for value in graph.outputs)


def _spec(value: ir.Value, optional: bool = False) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    shape = tuple(
        dimension if isinstance(dimension, int) else str(dimension.value)
        for dimension in value.shape or ()
    )
    return TensorSpec(value.name, str(value.dtype.numpy()), shape, optional)
