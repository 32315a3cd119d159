"""Mend what onnxruntime-genai's builder gets wrong, where one attribute or constant does it.

Each is found by what the torch model has and the graph does not, so that it ends by itself once the
builder is right. What is left is found by comparing the graph with PyTorch.
"""

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from propulsion_export.artifacts.rounding import numpy_dtype, rounded
from propulsion_export.graph.genai.nodes import Nodes, Place
from propulsion_export.graph.passes.constants import add_constant

_EPSILONS = ("variance_epsilon", "eps")  # of a norm's class in transformers or torch
_OLMO_EPSILON = 1e-5  # written in the code of OlmoLayerNorm, which has no attribute for it
_NORM = "LayerNormalization"  # the end of the names of its four operators


def mend_builder_(maker: Any) -> None:
    """Set what the builder's own settings get wrong, before it builds.

    It rounds Gemma's embedding factor to two decimals, and takes Olmo's layer norms for RMS norms.
    """
    kinds = {each.__name__ for each in type(maker).__mro__}
    if "GemmaModel" in kinds:
        maker.embed_attrs["scale"] = math.sqrt(maker.hidden_size)
    if "OLMoModel" in kinds:
        maker.layernorm_attrs["simple"] = False
        maker.layernorm_attrs["epsilon"] = _OLMO_EPSILON


def mend_graph_(nodes: Nodes, model: Any, dtype: str) -> None:
    """Set windows, epsilons and biases of the graph to those of the model."""
    _mend_windows_(nodes.graph, model.config)
    for path, places in nodes.places.items():
        module = model.get_submodule(path)
        if places[0].norm:
            _mend_epsilon_(nodes.norm(places[0]), module)
        elif getattr(module, "bias", None) is not None and module.bias.any():
            _mend_bias_(nodes, places, module.bias, dtype)


def _mend_windows_(graph: ir.Graph, config: Any) -> None:
    """A window for all layers has no `layer_types` in the configuration: the builder skips it."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "layer_types", None) is not None:
        return
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)


def _mend_epsilon_(node: ir.Node | None, norm: nn.Module) -> None:
    """The builder reads `rms_norm_eps`, and takes 1e-6 where a configuration calls it otherwise."""
    epsilon = next((getattr(norm, name) for name in _EPSILONS if hasattr(norm, name)), None)
    if epsilon is not None and node is not None and node.op_type.endswith(_NORM):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", float(epsilon))


def _mend_bias_(nodes: Nodes, places: Sequence[Place], bias: torch.Tensor, dtype: str) -> None:
    """Nemotron's MLP has biases that the builder leaves out."""
    for place in places:
        if nodes.bias(place) is None:
            part = bias[place.source : place.source + place.width].detach().double().cpu().numpy()
            values = rounded(part, numpy_dtype(dtype))
            name = f"{place.node}/bias"
            nodes.add_(place, add_constant(nodes.graph, name, values))
