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
from propulsion_export.artifacts.artifact import Runner
from propulsion_export.artifacts.file_names import GRAPH_FILE, WEIGHTS_FILE
from propulsion_export.artifacts.tensor_names import LOGITS, PAST, PRESENT
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import ToolError
from propulsion_export.graph.genai.base import BaseGraph
from propulsion_export.graph.genai.dequantised import dequantised, quantised_nodes
from propulsion_export.parity.comparison import FACTOR, UNIT_ROUNDOFF
from propulsion_export.runners.onnxruntime import onnxruntime_runner

_STEPS = 3  # tokens decoded one at a time behind the prompt
_PROMPT = 9  # tokens, or more, so that a window is passed
_LONGEST = 512  # a window beyond that is read from the graph only, where computing takes long
_LAYER = re.compile(r"/model/layers\.(\d+)/")
_LEVEL, _FLOAT32 = "accuracy_level", 1  # of MatMulNBits, to compute in float32
_REMEDY = "Export with --exporter transformers."


def check_base_graph(graph: BaseGraph) -> None:
    """Refuse a graph of onnxruntime-genai's builder that is not the model it was built from.

    A quantised one is compared with the dequantised weights, and computes in float32 for that:
    what the runtime rounds activations to is no mistake of the graph.

    Raises:
        ToolError: the graph computes something else, or does not run.
    """
    nodes = quantised_nodes(graph.program)
    model = dequantised(graph) if nodes else graph.model
    levels = [node.attributes.pop(_LEVEL, None) for node in nodes]
    try:
        for node in nodes:
            node.attributes[_LEVEL] = ir.AttrInt64(_LEVEL, _FLOAT32)
        check_built_graph(model, graph.program)
    finally:
        for node, level in zip(nodes, levels, strict=True):
            del node.attributes[_LEVEL]
            if level is not None:
                node.attributes[_LEVEL] = level


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
        found = _decoded(onnxruntime_runner(Path(place) / GRAPH_FILE), program, tokens)
        with quiet():
            own = _logits(model, tokens)
            with _in_float64(model):
                oracle = _logits(model, tokens)
    _check_close(name, found, own, oracle, str(model.dtype).removeprefix("torch."))


def _check_close(name: str, found: Array, own: Array, oracle: Array, dtype: str) -> None:
    error, reference = (float(np.abs(each - oracle).max()) for each in (found, own))
    allowed = FACTOR * max(reference, UNIT_ROUNDOFF[dtype] * float(np.abs(oracle).max()))
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
    prompt = window + _STEPS if _PROMPT <= window <= _LONGEST else _PROMPT
    generator = np.random.default_rng(0)
    return generator.integers(0, config.vocab_size, (1, prompt + _STEPS))


def _logits(model: PreTrainedModel, tokens: Array) -> Array:
    found = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    values: Array = found.double().numpy()
    return values


def _decoded(run: Runner, program: ir.Model, tokens: Array) -> Array:
    """The logits of all tokens, float64: a prompt at once, then one token at a time."""
    inputs = {str(value.name): value for value in program.graph.inputs}
    cache = {
        name: np.zeros([_size(each) for each in value.shape or ()], value.dtype.numpy())
        for name, value in inputs.items()
        if name.startswith((f"{PAST}.", "past.")) and value.dtype is not None
    }
    ends = range(tokens.shape[1] - _STEPS, tokens.shape[1] + 1)
    found = []
    for begin, end in zip((0, *ends), ends, strict=False):
        feeds = {
            "input_ids": tokens[:, begin:end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end)[None],
            **cache,
        }
        outputs = run({name: feeds[name] for name in inputs if name in feeds})
        found.append(outputs[LOGITS].astype(np.float64))
        cache = {name: outputs[_present(name)] for name in cache}
    return np.concatenate(found, axis=1)


def _size(dimension: int | ir.SymbolicDim) -> int:
    """A batch of one, an empty cache."""
    if isinstance(dimension, int):
        return dimension
    return 1 if dimension.value == "batch" else 0


def _present(past: str) -> str:
    """The output that a cache input is fed from in the next step."""
    return f"{PRESENT}{past.removeprefix(PAST).removeprefix('past')}"


@contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Let each layer compute in float64; outside its own call its weights are as they were."""
    hooks: list[Any] = []
    experts = getattr(model.config, "_experts_implementation", None)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    for unit in _units(model):
        kept: dict[torch.Tensor, torch.Tensor] = {}
        hooks.append(unit.register_forward_pre_hook(lambda each, _, k=kept: _widen_(each, k)))
        hooks.append(unit.register_forward_hook(lambda *_, k=kept: _restore_(k), always_call=True))
    try:
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
