"""Remove the multiplications by scales whose values are folded into weights."""

from collections.abc import Collection

import onnx_ir as ir

from propulsion_export.graph.passes.scale_products import products_by


class RemoveScales(ir.passes.InPlacePass):
    """Let the readers of each scaled value read the value itself; the scales go.

    Attributes:
        names: initializers that hold scales; those that are not in the graph are skipped.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def requires(self, model: ir.Model) -> None:
        for scale in self._scales(model):
            list(products_by(scale))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        scales = self._scales(model)
        for scale in scales:
            for product in list(products_by(scale)):
                bypass(graph, product.node.outputs[0], product.other)
                graph.remove(product.node, safe=True)
            remove_chain(graph, scale)
            graph.initializers.pop(str(scale.name))
        return ir.passes.PassResult(model, modified=bool(scales))

    def _scales(self, model: ir.Model) -> list[ir.Value]:
        initializers = model.graph.initializers
        return [initializers[name] for name in self.names if name in initializers]


def bypass(graph: ir.Graph, scaled: ir.Value, value: ir.Value) -> None:
    """Use `value` for `scaled` everywhere; an output of the graph keeps its name."""
    if scaled.is_graph_output():
        name = scaled.name
        scaled.name, value.name = f"{name}.scaled", name
    ir.convenience.replace_all_uses_with(scaled, value, replace_graph_outputs=True)


def remove_chain(graph: ir.Graph, value: ir.Value) -> None:
    """Remove the nodes that only changed the shape or type of a scale nobody reads any more."""
    for node, _ in list(value.uses()):
        remove_chain(graph, node.outputs[0])
        graph.remove(node, safe=True)
