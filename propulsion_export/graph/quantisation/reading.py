"""Read the quantised weights of a graph, whichever exporter wrote it."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from propulsion_export.errors import ArtifactError
from propulsion_export.graph.quantisation.node_weights import node_weights
from propulsion_export.graph.quantisation.weights import QuantisedWeight

# `<parameter>/Q4`, `<parameter>/DQ_Q8`; a further use of the weight has a number behind it. The
# builder of onnxruntime-genai writes `<MatMul>_Q4`.
_ENDING = re.compile(r"[/_](DQ_)?Q[48]([._]\d+)?$")


class Part(NamedTuple):
    """Rows of a quantised node's weight that are rows of a parameter.

    `node` is the node's name without its ending, such as `/model/layers.0/attn/qkv_proj/MatMul`;
    rows are from `start` to before `stop`, None: to the end.
    """

    node: str
    start: int = 0
    stop: int | None = None


def quantised_weights(
    model: ir.Model, places: Mapping[str, Sequence[Part]] | None = None
) -> dict[str, QuantisedWeight]:
    """The integers and scales of every quantised weight, by parameter name.

    Args:
        model: a finished graph, or one after `QuantiseWeights`; weights may be on disk.
        places: of each parameter, which rows of which nodes it is, one part behind the other.
            None: nodes are named by their parameter, as `QuantiseWeights` does. The builder of
            onnxruntime-genai names them by layer, and packs query, key and value.

    Raises:
        ArtifactError: a node is not in the graph, or as `node_weights`.
    """
    read = {parameter_of(each.name): each.values for each in node_weights(model)}
    if places is None:
        return read
    missing = sorted({part.node for parts in places.values() for part in parts} - read.keys())
    if missing:
        raise ArtifactError(*(f"{name}: is no quantised node of the graph" for name in missing))
    return {parameter: _joined(read, parts) for parameter, parts in places.items()}


def parameter_of(node: str) -> str:
    """The name of a quantised node without what tells that it is one: the parameter's name."""
    return _ENDING.sub("", node)


def _joined(read: Mapping[str, QuantisedWeight], parts: Sequence[Part]) -> QuantisedWeight:
    found = [read[part.node] for part in parts]
    rows = [slice(part.start, part.stop) for part in parts]
    integers = [weight.integers[r] for weight, r in zip(found, rows, strict=True)]
    scales = [weight.scales[r] for weight, r in zip(found, rows, strict=True)]
    return QuantisedWeight(np.concatenate(integers), np.concatenate(scales), found[0].block_size)
