"""Give graph inputs default values."""

import onnx_ir as ir

from propulsion_export.artifacts.artifact import Tensors


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
