"""Where the output of each module is in a graph of onnxruntime-genai's builder.

The builder packs the projections of queries, keys and values into one node, and takes Phi-3's
packed gate and up projections apart, so that a module may have a part of a node, or two nodes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from propulsion_export.graph.genai.editing import behind_
from propulsion_export.scaling.layer_rules import layer_kind, output_width

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_QKV = ("q_proj", "k_proj", "v_proj")
# By the module's path in its layer: the builder's name for its node. Norms first.
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
    "operator_norm": "operator_layernorm",
    "ffn_norm": "ffn_layernorm",
    "self_attn.q_norm": "attn/q_norm",
    "self_attn.k_norm": "attn/k_norm",
    "self_attn.q_layernorm": "attn/q_norm",
    "self_attn.k_layernorm": "attn/k_norm",
    "self_attn.query_layernorm": "attn/q_norm",
    "self_attn.key_layernorm": "attn/k_norm",
}
_LINEARS = {
    "self_attn.o_proj": "attn/o_proj",
    "self_attn.dense": "attn/o_proj",
    "self_attn.out_proj": "attn/o_proj",
    "mlp.gate_proj": "mlp/gate_proj",
    "mlp.up_proj": "mlp/up_proj",
    "mlp.down_proj": "mlp/down_proj",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
    "shared_mlp.output_linear": "mlp/down_proj",
    "feed_forward.gate": "moe/router",
    "feed_forward.w1": "mlp/gate_proj",
    "feed_forward.w2": "mlp/down_proj",
    "feed_forward.w3": "mlp/up_proj",
    "conv.in_proj": "conv/in_proj",
    "conv.out_proj": "conv/out_proj",
}
_HALVES = ("mlp.gate_up_proj", "shared_mlp.input_linear")
_EMBEDDING = "/model/embed_tokens"
_ENDS = {"model.embed_tokens": _EMBEDDING, "lm_head": "/lm_head"}
_FINAL = ("model.norm", "model.final_layernorm", "model.embedding_norm")
# Nodes of one name: what computes the product, and how a norm's value is called.
_PRODUCTS = ("", "_Q4", "_Q8", "NBits", "_matmul_Q4")
_GATHERS = ("Slice", "GatherBlockQuantized", "Gather")
_NORM_OUTPUTS = ("output_0", "SimplifiedLayerNormalization/output_0")


@dataclass(frozen=True)
class Place:
    """The part of a node's output that is a module's, or a part of it.

    Attributes:
        node: the builder's name, such as `/model/layers.0/attn/qkv_proj`.
        width: how many channels.
        begin: the first of them in the node's output.
        source: the first of them in the module's output.
        norm: whether the node is a norm.
    """

    node: str
    width: int
    begin: int = 0
    source: int = 0
    norm: bool = False


class Nodes:
    """The nodes of a builder's graph, found by the path of the torch module that each computes.

    Attributes:
        graph: the graph.
        places: of every module that has a node, by module path.
    """

    def __init__(self, model: Any, program: ir.Model) -> None:
        self.graph = program.graph
        self._nodes = {str(node.name): node for node in program.graph}
        self._values = {str(value.name): value for node in program.graph for value in node.outputs}
        self._ends: dict[str, ir.Value] = {}
        self.places: dict[str, tuple[Place, ...]] = {}
        for path, module in model.named_modules():
            places = tuple(self._expected(path, module, model)) if layer_kind(module) else ()
            if places and all(self._find(place) is not None for place in places):
                self.places[path] = places

    def bias(self, place: Place) -> ir.Node | None:
        """The node that adds the bias of a linear layer."""
        return self._nodes.get(f"{place.node}/Add")

    def product(self, place: Place) -> ir.Node | None:
        """The node that multiplies by the weight of a linear layer."""
        return self._product(place.node)

    def norm(self, place: Place) -> ir.Node | None:
        """The node that computes a norm; a cast may stand behind it."""
        value = self._find(place) if place.norm else None
        node = None if value is None else value.producer()
        while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        return node

    def output(self, place: Place) -> ir.Value:
        """What the users of a node read: its value, the bias and all that was put behind it."""
        value = self._ends.get(place.node) or self._find(place)
        assert value is not None
        return value

    def multiply_(self, place: Place, scale: ir.Value) -> None:
        """Multiply the node's output by `scale`."""
        self._ends[place.node] = behind_(self.graph, "Mul", self.output(place), scale)

    def add_(self, place: Place, bias: ir.Value) -> None:
        """Add `bias` to the node's output; of a linear layer, that is its bias from now on."""
        self._ends[place.node] = end = behind_(self.graph, "Add", self.output(place), bias)
        producer = end.producer()
        assert producer is not None
        self._nodes[f"{place.node}/Add"] = producer

    def _product(self, name: str) -> ir.Node | None:
        names = (f"{name}/MatMul{ending}" for ending in _PRODUCTS)
        return next((self._nodes[each] for each in names if each in self._nodes), None)

    def _find(self, place: Place) -> ir.Value | None:
        if place.norm:
            names = [f"{place.node}/{ending}" for ending in _NORM_OUTPUTS]
            return next((self._values[name] for name in names if name in self._values), None)
        if place.node == _EMBEDDING:
            names = [f"{place.node}/{ending}" for ending in _GATHERS]
            node = next((self._nodes[name] for name in names if name in self._nodes), None)
        else:
            node = self.bias(place) or self.product(place)
        return None if node is None else node.outputs[0]

    def _expected(self, path: str, module: Any, model: Any) -> Iterator[Place]:
        width = output_width(module)
        if match := _LAYER.fullmatch(path):
            yield from self._in_layer(f"/model/layers.{match[1]}", match[2], width)
            if match[2].rpartition(".")[2] in (*_QKV, "qkv_proj"):
                attention = model.get_submodule(path.rpartition(".")[0])
                yield from self._projections(f"/model/layers.{match[1]}/attn", path, attention)
        elif path in _FINAL:
            layers = model.config.num_hidden_layers
            yield Place(f"/model/layers.{layers}/final_norm_layernorm", width, norm=True)
        elif path in _ENDS:
            yield Place(_ENDS[path], width)

    def _in_layer(self, prefix: str, name: str, width: int) -> Iterator[Place]:
        if name in _NORMS:
            yield Place(f"{prefix}/{_NORMS[name]}", width, norm=True)
        elif name in _LINEARS:
            yield Place(f"{prefix}/{_LINEARS[name]}", width)
        elif name in _HALVES:
            half = width // 2
            yield Place(f"{prefix}/mlp/gate_proj", half)
            yield Place(f"{prefix}/mlp/up_proj", half, source=half)

    def _projections(self, prefix: str, path: str, attention: Any) -> Iterator[Place]:
        """Those of queries, keys and values, of which model and graph may each have one or three.

        An execution provider without packed attention, such as dml, has three nodes.
        """
        name = path.rpartition(".")[2]
        if name == "qkv_proj":
            queries = attention.config.num_attention_heads * attention.head_dim
            keys = attention.num_key_value_heads * attention.head_dim
            widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        else:
            widths = {each: output_width(getattr(attention, each)) for each in _QKV}
        packed, begin = self._product(f"{prefix}/qkv_proj") is not None, 0
        for each, width in widths.items():
            if name in (each, "qkv_proj"):
                source = begin if name == "qkv_proj" else 0
                node, first = ("qkv_proj", begin) if packed else (each, 0)
                yield Place(f"{prefix}/{node}", width, first, source)
            begin += width
