"""Trace a torch model to an onnx_ir model, with the exporter of transformers.

The only module that touches `transformers.exporters`, whose interface moves with every minor
release. The graph is returned as traced, not optimised: every weight and every attached scale is
still an initializer with its own name, which is what the passes in `graph/` work on.
"""

import copy
import importlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.artifacts.manifest import DEFAULT_OPSET
from propulsion_export.base_model.caches import check_cache
from propulsion_export.base_model.positions import known_positions
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.environment.collection import no_collection
from propulsion_export.environment.quiet import quiet, quiet_while_tracing
from propulsion_export.environment.stages import stage
from propulsion_export.errors import PropulsionExportError, ToolError, UnavailableError

_REMEDY = "Install the tested version: pip install 'transformers>=5.24,<5.25'."
# Arguments by which generate() chooses outputs; they are no inputs of a graph.
_FLAGS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
_NONE: Mapping[str, torch.Tensor] = {}
_REMEDY_FIXED = "No graph of it can read texts of every length; merge takes it."
# Where the exporter says for which sizes the traced graph holds: `s18: VR[2, int_oo]`.
_RANGES = "pkg.torch.export.ExportedProgram.range_constraints"
_RANGE = re.compile(r"(\w+): VR\[(\d+), (\w+)\]")
# torch assumes that no size is 0 or 1, nor one derived from it, such as that of all tokens but one;
# graphs compute those too. A higher bound comes from a branch.
_FEWEST = 4
_DECODED = 5  # tokens that a decoder is traced with; no multiple of the batch size


def trace(
    model: PreTrainedModel,
    inputs: Tensors,
    *,
    opset: int = DEFAULT_OPSET,
    extra: Mapping[str, torch.Tensor] = _NONE,
) -> ir.Model:
    """Trace `model` with dynamic batch and sequence dimensions.

    Args:
        model: in evaluation mode; scales attached to it are traced as initializers.
        inputs: padded sample inputs, int64 [batch, sequence], see `sample_inputs.trace_inputs`.
        opset: ONNX opset of the graph.
        extra: further inputs of the model, [batch, …]; only the batch varies.

    Raises:
        ToolError: the exporter refused the model, or fixed its length or bounds it.
        UnavailableError: the installed transformers has another exporter interface.
    """
    tensors = _tensors(inputs)
    wide = any(values.ndim > 2 for values in tensors.values())
    shapes = _varying(tensors, extra) if wide else None  # the last axis of such an input is fixed
    # A decoder under another head would also return its cache.
    program = _export(model, {**tensors, **extra, "use_cache": False}, shapes, opset)
    varying: dict[str, Any] = {name: {0: None, 1: None} for name in inputs}
    varying |= {name: {0: None} for name in extra}
    _refuse_fixed(program, type(model).__name__, varying)
    _refuse_bounded(program, model, inputs)
    _keep_tensors_(program.graph.outputs)
    return program


def trace_decoder(
    model: PreTrainedModel,
    prompt: Tensors,
    *,
    opset: int = DEFAULT_OPSET,
    extra: Mapping[str, torch.Tensor] = _NONE,
) -> ir.Model:
    """Trace one decoding step over several tokens and a cache, which may be empty.

    The graph is prefill and decoding in one. All layers have a cache of the same length, those of
    a sliding window too: their window is in the mask.

    Args:
        model: a causal language model, as for `trace`.
        prompt: `input_ids` and `attention_mask`, padded on the left, see
            `sample_inputs.trace_prompt`.
        opset: ONNX opset of the graph.
        extra: as for `trace`.

    Returns:
        A graph whose cache inputs and outputs are named by the exporter, see
        `graph.passes.cache.NameCache`.

    Raises:
        ToolError: the exporter refused the model, or fixed the length of a dimension.
        UnavailableError: the installed transformers has another exporter interface.
    """
    model = copy.copy(model)  # what the exporter does to its forward stays behind
    # Without a configuration the cache of no layer forgets what slid out of its window.
    _, arguments = _decoding_steps(model, _tensors(prompt), DynamicCache())
    return _export(model, {**arguments, **extra}, _varying(arguments, extra), opset)


def trace_encoder_decoder(
    model: PreTrainedModel,
    prompt: Tensors,
    *,
    opset: int = DEFAULT_OPSET,
    extra: Mapping[str, torch.Tensor] = _NONE,
) -> dict[str, ir.Model]:
    """Trace the encoder, the decoder's first step and its later ones.

    Args:
        model: an encoder-decoder, as for `trace`.
        prompt: `input_ids` and `attention_mask`, padded, see `sample_inputs.trace_inputs`.
        opset: ONNX opset of the graphs.
        extra: as for `trace`, of every graph.

    Returns:
        By optimum's file names; caches are named by the exporter, see `graph.passes.cache`.

    Raises:
        ToolError: the exporter refused the model, or fixed the length of a dimension.
        UnavailableError: the installed transformers has another exporter interface.
    """
    tensors = _tensors(prompt)
    model, encoder = copy.copy(model), copy.copy(model)
    # Through the whole model, so that weights keep their names.
    encoder.forward = lambda **inputs: model.get_encoder()(**inputs)
    graphs = [_export(encoder, {**tensors, **extra}, _varying(tensors, extra), opset)]
    for arguments in _decoding_steps(model, tensors):
        # One token is what generate() reads at a time; the graph reads any number.
        arguments["decoder_input_ids"] = arguments["decoder_input_ids"].repeat(1, _DECODED)
        varying = _varying(arguments, extra)
        graphs.append(_export(model, {**arguments, **extra}, varying, opset))
    return dict(zip(ENCODER_DECODER_FILES, graphs, strict=True))


def _decoding_steps(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], cache: Cache | None = None
) -> list[dict[str, Any]]:
    """What generate() gives the model's forward: for the prompt, and for two tokens behind it.

    The model is a copy, whose generation settings are replaced.
    """
    check_cache(model)
    decompose = _exporter_module("utils").decompose_for_generation
    given = prompt if cache is None else {**prompt, "cache": cache}
    with _refusals(model), quiet_while_tracing(), stage("trace: inputs of a decoding step"):
        # generate() takes what is not set from the model's own settings, which may ask for another
        # search. It must not stop before the steps that are captured.
        model.generation_config = _greedy(model.generation_config)
        stages = decompose(
            model, given, generation_config=model.generation_config, multi_token_decode=True
        )
    return [
        {name: value for name, value in stages[stage][1].items() if name not in _FLAGS}
        for stage in ("prefill", "decode")
    ]


def _greedy(settings: GenerationConfig) -> GenerationConfig:
    """Settings for plain greedy generation with the special tokens of other settings."""
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    named = {name: getattr(settings, name) for name in tokens}
    return GenerationConfig(do_sample=False, num_beams=1, min_new_tokens=3, **named)


def _varying(arguments: Mapping[str, Any], extra: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Which axes vary: batch and length, also of the cache's [batch, heads, length, width]."""
    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: auto} for name in extra}
    for name, value in arguments.items():
        if isinstance(value, Cache):
            leaves = _exporter_module("utils").get_leaf_tensors(value)
            shapes[name] = [{0: auto, 2: auto} for _ in leaves]
        elif isinstance(value, ModelOutput):
            shapes[name] = [{0: auto, 1: auto} for _ in value]
        else:
            shapes[name] = {0: auto, 1: auto}
    return shapes


def _tensors(inputs: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in inputs.items()}


def _export(
    model: PreTrainedModel, arguments: dict[str, Any], shapes: dict[str, Any] | None, opset: int
) -> ir.Model:
    exporters = _exporter_module("exporter_onnx")
    config = exporters.OnnxConfig(
        dynamic=True, dynamic_shapes=shapes, opset_version=opset, optimize=False
    )
    with (
        _refusals(model),
        quiet_while_tracing(),
        _without_growth(model),
        no_collection(),
        stage(f"trace {type(model).__name__}"),
    ):
        program = exporters.OnnxExporter().export(model, arguments, config).program
    if not isinstance(program, ir.Model):
        raise UnavailableError(
            f"the exporter of transformers returned a {type(program).__name__}, expected an "
            "onnx_ir.Model",
            remedy=_REMEDY,
        )
    if shapes is not None:
        _refuse_fixed(program, type(model).__name__, shapes)
    return program


@contextmanager
def _without_growth(model: PreTrainedModel) -> Iterator[None]:
    """Trace a `dynamic` rope as it is up to the model's positions; it branches beyond them."""
    growing = [
        (module, module.rope_type)
        for module in model.modules()
        if "dynamic" in str(getattr(module, "rope_type", ""))
    ]
    for module, kind in growing:
        module.rope_type = _without_dynamic(kind)
    try:
        yield
    finally:
        for module, kind in growing:
            module.rope_type = kind


def _without_dynamic(kind: Any) -> Any:
    """The kind of a rope, or its kinds by layer type, with `default` in place of dynamic ones."""
    if isinstance(kind, dict):
        return {layer: _without_dynamic(each) for layer, each in kind.items()}
    return "default" if "dynamic" in kind else kind


def _refuse_fixed(program: ir.Model, model: str, shapes: Mapping[str, Any]) -> None:
    """Batch and length have to vary; where a model depends on the size traced, torch fixes it.

    A multiple of a length, as of blocks of attention, is no length that varies either.
    """
    fixed = [
        f"{model}: {value.name} is traced as {list(map(str, value.shape))}, expected a dimension "
        f"{axis} that varies"
        for value in program.graph.inputs
        if value.shape is not None
        for axis in _varying_axes(shapes.get(str(value.name)), len(value.shape))
        if str(value.shape[axis]).isdigit() or "*" in str(value.shape[axis])
    ]
    if fixed:
        raise ToolError(*fixed, remedy=_REMEDY_FIXED)


def _refuse_bounded(program: ir.Model, model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse lengths below or above which the model branches: the graph has one branch only."""
    ranges = {
        symbol: (int(low), math.inf if high == "int_oo" else int(high))
        for symbol, low, high in _RANGE.findall(program.graph.metadata_props.get(_RANGES, ""))
    }
    longest = known_positions(model.config) or 0
    wrong = [
        f"{type(model).__name__}: is traced for {low} to {high} tokens, "
        f"expected 2 to {longest or 'any number'}"
        for value in program.graph.inputs
        if value.name in set(names) and value.shape is not None
        for low, high in [ranges.get(str(value.shape[1]), (2, math.inf))]
        if low > _FEWEST or high < longest
    ]
    if wrong:
        raise ToolError(*dict.fromkeys(wrong), remedy=_REMEDY_FIXED)


def _keep_tensors_(outputs: MutableSequence[ir.Value]) -> None:
    """Drop the parts of a cache that a model returns although nobody asked for it, as XLNet's."""
    outputs[:] = [value for value in outputs if "." not in str(value.name)]


def _varying_axes(axes: Any, rank: int) -> Iterable[int]:
    """The varying axes of an input; those of a cache or an encoder's output have no name yet."""
    return axes if isinstance(axes, dict) else (0, 2 if rank == 4 else 1)


def _exporter_module(name: str) -> Any:
    try:
        with quiet():
            return importlib.import_module(f"transformers.exporters.{name}")
    except ImportError as error:
        raise UnavailableError(
            f"transformers has no usable ONNX exporter ({error})", remedy=_REMEDY
        ) from error


@contextmanager
def _refusals(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every stage of the exporter has exceptions of its own
        cause = error.__cause__ or error
        if isinstance(cause, PropulsionExportError):  # said by what is attached to the model
            raise cause from None
        if type(cause).__name__ == "GuardOnDataDependentSymNode":
            raise ToolError(_branching(model), remedy="Merge the adapter instead.") from error
        first = next(iter(str(cause).strip().splitlines()), "")
        raise ToolError(
            f"{type(model).__name__}: cannot be traced ({type(cause).__name__}: {first})"
        ) from error


def _branching(model: PreTrainedModel) -> str:
    """What is wrong with a model whose code branches on the values of a batch."""
    found = f"{type(model).__name__}: its code branches on the values of a batch"
    if switches := rope_switches(model.config.to_dict()):
        found += f" (longrope, at {' and '.join(map(str, switches))} tokens of the longest row)"
    return f"{found}, expected code that a graph can hold"
