"""Name the cache and inputs of a generative model as optimum and onnxruntime-genai do."""

import re
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from propulsion_export.artifacts.tensor_names import PAST, PRESENT

# The exporter's names for the input and output tensors of a cache.
_TRACED = re.compile(
    r"(?:input\.|output\.)?cache\.(?:(self|cross)_attention_cache\.)?layers\.(\d+)\.(key|value)s"
)
_SIDES = {None: "", "self": "decoder.", "cross": "encoder."}
_DECODERS_OWN = {
    "attention_mask": "encoder_attention_mask",
    "decoder_input_ids": "input_ids",
    "encoder_outputs.last_hidden_state": "encoder_hidden_states",
}
_FIRST = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "encoder_attention_mask",
    "encoder_hidden_states",
)


class NameCache(ir.passes.InPlacePass):
    """Call cache inputs `past_key_values.N.key` and outputs `present.N.key`, `value` likewise.

    In an encoder-decoder's decoder they are `past_key_values.N.decoder.key` and, for the encoder's
    output, `past_key_values.N.encoder.key`; the latter are not returned. Other tensors come first;
    then, in the order optimum expects, layer by layer the decoder's before the encoder's.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any(value.name == "decoder_input_ids" for value in graph.inputs):
            _name_decoders_own(graph)
        for value in graph.inputs:
            _rename(value, PAST)
        for value in graph.outputs:
            _rename(value, PRESENT)
        _drop_returned_inputs(model)
        for values in (graph.inputs, graph.outputs):
            ordered = sorted(values, key=_rank)
            values.clear()
            values.extend(ordered)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        past = [name for name in _names(model.graph.inputs) if name.startswith(f"{PAST}.")]
        returned = [name for name in _names(model.graph.outputs) if name.startswith(f"{PRESENT}.")]
        kept = [name.replace(PAST, PRESENT, 1) for name in past if ".encoder." not in name]
        if not returned or (past and kept != returned):
            raise ir.passes.PostconditionError(
                f"the cache goes in as {past[:2]}… and comes out as {returned[:2]}…"
            )


def _name_decoders_own(graph: ir.Graph) -> None:
    for value in graph.inputs:
        value.name = _DECODERS_OWN.get(str(value.name), value.name)


def _rename(value: ir.Value, prefix: str) -> None:
    match = _TRACED.fullmatch(str(value.name))
    if match:
        value.name = f"{prefix}.{match[2]}.{_SIDES[match[1]]}{match[3]}"


def _drop_returned_inputs(model: ir.Model) -> None:
    """Remove outputs that an encoder-decoder returns unchanged, and inputs it then never reads."""
    graph = model.graph
    given = set(_names(graph.inputs))
    for value in list(graph.outputs):
        name = str(value.name)
        same = name.replace(PRESENT, PAST, 1) in given and ".encoder." in name
        if same or name == "encoder_last_hidden_state":
            graph.outputs.remove(value)
    RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        if value.name == "encoder_hidden_states" and not value.uses():
            graph.inputs.remove(value)


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _rank(value: ir.Value) -> tuple[int, int, bool]:
    """Sort key; sorting is stable, so keys stay before values and unknown names in place."""
    name = str(value.name)
    prefix, _, rest = name.partition(".")
    if prefix in (PAST, PRESENT):
        return len(_FIRST), int(rest.partition(".")[0]), ".encoder." in name
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST)), -1, False
