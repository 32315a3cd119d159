"""Build a graph from a loaded model with onnxruntime-genai's builder; no other module calls it."""

import copy
import importlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn
from transformers import PreTrainedModel

from propulsion_export.artifacts.file_names import GENAI_CONFIG_FILE
from propulsion_export.artifacts.manifest import Dtype
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.environment.quiet import quiet_while_tracing
from propulsion_export.errors import (
    PropulsionExportError,
    ToolError,
    UnavailableError,
    first_line,
)
from propulsion_export.graph.genai.architectures import REMEDY, builder_class
from propulsion_export.graph.genai.mends import mend_builder_
from propulsion_export.graph.genai.options import GenaiOptions

_FLOATS = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
_INTEGERS = {4: "INT4", 8: "INT8"}  # symmetric
# Kinds of rope that LlamaModel takes for the default one; its base class knows them.
_LLAMA_SKIPS = ("linear", "yarn")


@dataclass(frozen=True)
class BuiltGraph:
    """What the builder made of a model.

    Attributes:
        program: the graph; its weights are still those of the model, so the model must live on.
        head_size: the width of a head in the cache.
        write_config: writes `genai_config.json` into a directory that has the tokenizer and the
            generation settings.
    """

    program: ir.Model
    head_size: int
    write_config: Callable[[Path], None]


def build_graph(model: PreTrainedModel, dtype: Dtype, options: GenaiOptions) -> BuiltGraph:
    """Build the graph of a model as it is in memory, which is left as it is.

    Args:
        model: with its weights in `dtype`.
        dtype: of the activations.
        options: of the builder.

    Raises:
        UnavailableError: onnxruntime-genai is missing, or has no builder of the tested version.
        UsageError: the execution provider has no kernels for `dtype`.
        ToolError: the builder does not know the model, or fails on it.
    """
    name = check_possible(model, dtype, options)
    builders = _builders()
    with _refusals(model), quiet_while_tracing():
        own = shared_copy(model)
        maker = _maker(getattr(builders, name), own, dtype, options)
        mend_builder_(maker)
        maker.make_model("")
        program = maker.model if options.bits is None else maker.to_nbits()
        program.graph.sort()
    _check_outputs(program, type(model).__name__)
    return BuiltGraph(program, maker.head_size, partial(_write_config, maker, own.config))


def check_possible(model: PreTrainedModel, dtype: Dtype, options: GenaiOptions) -> str:
    """Refuse what is known to fail, before any work.

    Returns:
        The name of the builder's class.

    Raises:
        UsageError: the execution provider has no kernels for `dtype`.
        ToolError: the builder does not know the model, or is known to get it wrong.
    """
    name = builder_class(model.config, type(model).__name__, options)
    options.check_dtype(dtype)
    return name


def _check_outputs(program: ir.Model, model: str) -> None:
    """Refuse a graph with outputs that nothing computes, as the cache for cuda in float32.

    Raises:
        ToolError: naming them.
    """
    lost = [str(value.name) for value in program.graph.outputs if value.producer() is None]
    if lost:
        raise ToolError(
            f"{model}: no node of the graph of onnxruntime-genai's builder computes {lost[0]}"
            + (f" and {len(lost) - 1} more outputs" if lost[1:] else ""),
            remedy=REMEDY,
        )


def _maker(kind: Any, own: PreTrainedModel, dtype: Dtype, options: GenaiOptions) -> Any:
    """An instance of the builder's class that takes its weights from the model `own`."""
    config = own.config
    config.architectures = [type(own).__name__]
    if hasattr(config, "quantization_config"):  # of the file that the weights were read from
        del config.quantization_config
    head, embedding = own.get_output_embeddings(), own.get_input_embeddings()
    extra = options.extra(dtype) | {"shared_embeddings": head.weight is embedding.weight}
    if extra["shared_embeddings"]:
        extra["op_types_to_quantize"] = ("MatMul", "Gather")
    weights = activations = ir.DataType[_FLOATS[dtype]]
    if options.bits is not None:
        weights = ir.DataType[_INTEGERS[options.bits]]
    methods = {"load_weights": lambda maker, path: own, "make_rope_init": _rope_init(kind)}
    subclass = type(kind.__name__, (kind,), methods)
    return subclass(config, activations, weights, options.execution_provider, "", extra)


def _rope_init(kind: Any) -> Callable[[Any, Any], None]:
    """The class's own reading of rope settings, or its base's where LlamaModel skips some."""
    llama = any(each.__name__ == "LlamaModel" for each in kind.__mro__)

    def make_rope_init(maker: Any, config: Any) -> None:
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        reader = kind.__mro__[-2] if llama and rope in _LLAMA_SKIPS else kind
        reader.make_rope_init(maker, config)

    return make_rope_init


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares the values of the tensors.

    The builder takes modules apart; and what is folded into the copy, or cast, stays in the copy.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, shared)


def _write_config(maker: Any, config: Any, directory: Path) -> None:
    maker.model_name_or_path = str(directory)
    switches = rope_switches(config.to_dict())
    own = copy.deepcopy(config)
    with quiet_while_tracing():
        try:
            maker.make_genai_config(own, {}, str(directory))
        except ValueError:  # nobody names a token that ends a text, so none does
            own.eos_token_id = []
            own.pad_token_id = own.pad_token_id or 0
            maker.make_genai_config(own, {}, str(directory))
    file = directory / GENAI_CONFIG_FILE
    content = json.loads(file.read_text(encoding="utf-8"))
    # The runtime does not compute a text again where its rotary frequencies change.
    longest = min(content["model"]["context_length"], *switches, content["search"]["max_length"])
    content["model"]["context_length"] = content["search"]["max_length"] = longest
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _builders() -> Any:
    try:
        with quiet_while_tracing(), _root_logger_kept():
            return importlib.import_module("onnxruntime_genai.models.builders")
    except ImportError as error:
        raise UnavailableError(
            f"onnxruntime-genai has no usable builder ({first_line(error)})",
            remedy="Run: pip install 'propulsion-export[genai]'.",
        ) from error


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what onnxruntime's quantizers do when imported: they log everything of everyone."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


@contextmanager
def _refusals(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except PropulsionExportError:
        raise
    except Exception as error:  # the builder raises whatever its code runs into
        raise ToolError(
            f"{type(model).__name__}: onnxruntime-genai's builder failed "
            f"({type(error).__name__}: {first_line(error)})",
            remedy=REMEDY,
        ) from error
