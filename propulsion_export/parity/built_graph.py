"""Compare a decoder's graph that another library built with the torch model it was built from."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.file_names import GRAPH_FILE, WEIGHTS_FILE
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import ToolError
from propulsion_export.graph.genai.base import BaseGraph
from propulsion_export.graph.genai.dequantised import dequantised, quantised_nodes
from propulsion_export.graph.passes.float_layers import ComputeInFloat
from propulsion_export.graph.signature import signature
from propulsion_export.parity.comparison import FACTOR, UNIT_ROUNDOFF
from propulsion_export.parity.differences import differences, without_ruled_out
from propulsion_export.parity.float64 import float64_throughout
from propulsion_export.runners.decoding import replaying
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.right_padding import RightPaddedModel

_TOKENS = 12  # read, the last of them step by step; more where that is needed to pass a window
_BEYOND = 6  # tokens behind a window
_LONGEST = 512  # a window beyond that is read from the graph only, where computing takes long
_LAYER = re.compile(r"/model/layers\.(\d+)/")
_REMEDY = "Export with --exporter transformers."


def check_base_graph(graph: BaseGraph) -> None:
    """Refuse a graph of onnxruntime-genai's builder that is not the model it was built from.

    A quantised one is compared with the dequantised weights, and computes in float32 for that:
    what the runtime rounds is no mistake of the graph.

    Raises:
        ToolError: the graph computes something else, or does not run.
    """
    if not quantised_nodes(graph.program):
        check_built_graph(graph.model, graph.program)
        return
    program = graph.program.clone()
    ComputeInFloat()(program)
    check_built_graph(dequantised(graph), program)


def check_built_graph(model: PreTrainedModel, program: ir.Model) -> None:
    """Refuse a graph whose logits are not those of the model.

    The oracle is the model in float64, one layer at a time, so that memory does not double. The
    graph may err FACTOR times as much as the model does in its own dtype, as in `comparison`.

    Args:
        model: in the graph's dtype.
        program: a decoder with a cache, to be run by ONNX Runtime on the CPU.

    Raises:
        ToolError: the graph computes something else, or does not run.
    """
    name = type(model).__name__
    _check_windows(model, program)
    tokens = _tokens(model.config)
    with tempfile.TemporaryDirectory(prefix="propulsion-export-") as place, torch.inference_mode():
        ir.save(program, Path(place) / GRAPH_FILE, external_data=WEIGHTS_FILE)
        run = onnxruntime_runner(Path(place) / GRAPH_FILE)
        decoder = RightPaddedModel(run, signature(program)[0])
        batch = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        found = replaying(decoder)(batch)[LOGITS].astype(np.float64)
        with quiet():
            own = _logits(model, tokens)
            with _in_float64(model):
                oracle = _logits(model, tokens)
    _check_close(name, found, own, oracle, str(model.dtype).removeprefix("torch."))


def _check_close(name: str, found: Array, own: Array, oracle: Array, dtype: str) -> None:
    error, reference = (float(differences(each, oracle).max()) for each in (found, own))
    scale = float(np.abs(without_ruled_out(oracle)).max())
    allowed = FACTOR * max(reference, UNIT_ROUNDOFF[dtype] * scale)
    if not error <= allowed:  # NaN too
        raise ToolError(
            f"{name}: the graph of onnxruntime-genai's builder is not the model: its logits are "
            f"off by {error:.2g}, expected at most {allowed:.2g}",
            remedy=_REMEDY,
        )


def _check_windows(model: PreTrainedModel, program: ir.Model) -> None:
    """Refuse attention over another window than the model's, layer by layer."""
    config = model.config
    window = getattr(config, "sliding_window", None) or -1
    kinds = getattr(config, "layer_types", None)
    wrong = []
    for node in program.graph:
        match = _LAYER.match(str(node.name))
        if node.op_type != "GroupQueryAttention" or match is None:
            continue
        windowed = kinds is None or kinds[int(match[1])] == "sliding_attention"
        expected = window if windowed else -1
        found = node.attributes.get_int("local_window_size", -1)
        if found != expected:
            wrong.append(f"{node.name}: has a window of {found}, the model of {expected} tokens")
    if wrong:
        raise ToolError(*wrong, remedy=_REMEDY)


def _tokens(config: Any) -> Array:
    """Random tokens, int64 [1, length]: longer than the window where that is short."""
    window = getattr(config, "sliding_window", None) or 0
    length = max(window + _BEYOND, _TOKENS) if window <= _LONGEST else _TOKENS
    return np.random.default_rng(0).integers(0, config.vocab_size, (1, length))


def _logits(model: PreTrainedModel, tokens: Array) -> Array:
    found = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    values: Array = found.double().numpy()
    return values


@contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Compute in float64 throughout; outside a layer's own call its weights are as they were."""
    hooks: list[Any] = []
    experts = getattr(model.config, "_experts_implementation", None)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    for unit in _units(model):
        kept: dict[torch.Tensor, torch.Tensor] = {}
        hooks.append(unit.register_forward_pre_hook(lambda each, _, k=kept: _widen_(each, k)))
        hooks.append(unit.register_forward_hook(lambda *_, k=kept: _restore_(k), always_call=True))
    try:
        with float64_throughout():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        if model._can_set_experts_implementation():
            model.set_experts_implementation(experts)


def _units(model: nn.Module) -> list[nn.Module]:
    """The layers, and every module with parameters of its own outside them."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=[])
    inside = {id(module) for layer in layers for module in layer.modules()}
    others = [
        module
        for module in model.modules()
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None
    ]
    return [*layers, *others]


def _widen_(module: nn.Module, kept: dict[torch.Tensor, torch.Tensor]) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            kept[parameter] = parameter.data
            parameter.data = parameter.data.double()


def _restore_(kept: dict[torch.Tensor, torch.Tensor]) -> None:
    while kept:
        parameter, values = kept.popitem()
        parameter.data = values
