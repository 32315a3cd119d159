"""The torch model that a builder's quantised graph computes."""

from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from propulsion_export.graph.genai.base import BaseGraph
from propulsion_export.graph.genai.builder import shared_copy
from propulsion_export.graph.quantisation.reading import Part, quantised_weights
from propulsion_export.graph.quantisation.weights import dequantise

_QUANTISED = "MatMulNBits"
_QUANTISED_TABLE = "GatherBlockQuantized"


def dequantised(graph: BaseGraph) -> PreTrainedModel:
    """A copy of the graph's model with the weights that the graph multiplies with.

    They are integer times scale, rounded to the dtype of the model's own. An embedding that is read
    from the integers of the head shares the head's weight.

    Raises:
        ArtifactError: the integers have zero points.
    """
    model = shared_copy(graph.model)
    weights = quantised_weights(graph.program, dict(_parts(graph)))
    for path, weight in weights.items():
        module = model.get_submodule(path)
        values = torch.from_numpy(dequantise(weight)).to(module.weight.dtype)
        module.weight = nn.Parameter(values, requires_grad=False)
    if any(node.op_type == _QUANTISED_TABLE for node in graph.program.graph):
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
    return model


def quantised_nodes(program: ir.Model) -> list[ir.Node]:
    """The nodes that multiply by quantised weights."""
    return [node for node in program.graph if node.op_type == _QUANTISED]


def _parts(graph: BaseGraph) -> Iterator[tuple[str, list[Part]]]:
    for path, places in graph.nodes.places.items():
        products = [graph.nodes.product(place) for place in places]
        if all(node is not None and node.op_type == _QUANTISED for node in products):
            yield (
                path,
                [
                    Part(f"{place.node}/MatMul", place.begin, place.begin + place.width)
                    for place in places
                ],
            )
