"""Put an adapter's scales behind the modules of a graph by onnxruntime-genai's builder.

The builder names its nodes by layer. Which channels of a node that packs query, key and value are a
module's is known from the model's class and configuration; no weight of it is needed.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.layout import Layout, pack, plan_layout
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.errors import AdapterError
from propulsion_export.graph.genai.nodes import Nodes
from propulsion_export.graph.genai.scaled import insert_slots_, neighbours
from propulsion_export.graph.refolding.modules import Brought
from propulsion_export.graph.slot_plan import parts_of
from propulsion_export.scaling.attach import check_fits


def insert_builder_scales_(program: ir.Model, model: Any, adapter: Adapter, dtype: str) -> Brought:
    """Multiply the outputs, or inputs, of an adapter's modules by initializers, in place.

    Args:
        program: the graph of the base model.
        model: the base model's class without weights, on the meta device.
        adapter: what is to be folded in.
        dtype: of the graph.

    Raises:
        AdapterError: a tensor does not fit the model, or has no node in the graph.
    """
    check_fits(model, adapter)
    if adapter.biases:
        raise AdapterError(
            *(
                f"{path}: has a trained bias, which this graph has no slot for"
                for path in adapter.biases
            ),
            remedy="Take a switchable artifact of the base model as the source.",
        )
    nodes = Nodes(model, program)
    beside = neighbours(nodes, model, [adapter])
    order = [name for name, _ in model.named_modules()]
    layout = plan_layout([adapter, beside] if beside else [adapter], order)
    inside = insert_slots_(nodes, layout, dtype)
    return Brought(_scales(adapter, layout, inside), {})


def _scales(adapter: Adapter, layout: Layout, inside: Layout) -> dict[str, Array]:
    """The values of each initializer; ones for modules that the adapter does not scale."""
    width = sum(slot.length for slot in layout[SCALES_INPUT])
    packed = pack(adapter, layout, {SCALES_INPUT: np.ones(width)})[SCALES_INPUT]
    return {
        name: packed[slot.offset : slot.offset + slot.length]
        for name, slot in parts_of(inside)[SCALES_INPUT].items()
    }
