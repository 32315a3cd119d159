"""`onnx`: a base model and adapters become a graph, the adapters folded in or switchable."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.provenance import adapter_tasks, find_base
from propulsion_export.adapters.specification import check_identity, read_adapters, source_of
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.layout import check_range
from propulsion_export.artifacts.manifest import (
    DEFAULT_OPSET,
    Dtype,
    ExecutionProvider,
    Exporter,
    Mode,
    QuantizationEntry,
)
from propulsion_export.artifacts.merged_base import check_not_merged, check_undamaged
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.tasks import resolve_task
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.environment.stages import stage
from propulsion_export.errors import UsageError
from propulsion_export.graph.build import SharedTrace
from propulsion_export.pipeline.onnx_files import Exported, write_artifact
from propulsion_export.pipeline.onnx_options import OnnxOptions, check_options, check_slots
from propulsion_export.pipeline.places import Places
from propulsion_export.pipeline.prepared_base import PreparedBase, prepare_base
from propulsion_export.pipeline.producing import (
    ExporterChoice,
    GraphOptions,
    Produced,
    Wanted,
    produce,
)
from propulsion_export.pipeline.quantisation_options import (
    QuantizationForm,
    QuantizedType,
)
from propulsion_export.pipeline.quantising import describe, quantisation_of
from propulsion_export.pipeline.text_files import TextFiles

_DEFAULTS = OnnxOptions()
# Called with a mode, the exporter that made its graph, and why.
Chosen = Callable[[Mode, Exporter, str], None]


def export_onnx(
    adapter: Sequence[str | Path],
    output: Path,
    *,
    model: str | None = None,
    mode: Mode = "folded",
    task: str = "auto",
    dtype: str = "keep",
    opset: int = DEFAULT_OPSET,
    exporter: ExporterChoice = "auto",
    execution_provider: ExecutionProvider = "cpu",
    quantize: QuantizedType | None = None,
    quantization_form: QuantizationForm | None = None,
    block_size: int | None = None,
    accuracy_level: int | None = None,
    quantize_activations: bool = False,
    calibration: Path | None = None,
    untie: bool = False,
    allow_range: bool = False,
    placement: str | None = None,
    max_labels: int | None = None,
    train_bias: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    chosen: Callable[[Exporter, str], None] = lambda exporter, reason: None,
) -> Artifact:
    """Trace a base model with adapters to ONNX, or with slots for adapters to come.

    Args:
        adapter: directories, or `NAME=DIR`; at most one to fold, any number otherwise. With none,
            `folded` exports the base model alone, `switchable` and `bank` with slots that
            `add_adapter` fills.
        output: directory to write `model.onnx`, its weights, configuration, tokenizer and adapters.
        model: base model by path or name; default: the one the adapters name.
        mode: `folded`, the adapter in the weights; `switchable`, its scales an optional input;
            `bank`, each row of a batch chooses its own.
        task: which head the graph has; `auto`: the adapters' or the checkpoint's.
        dtype: `keep`, `float32`, `bfloat16` or `float16`, of weights and activations.
        opset: ONNX opset version of transformers' exporter; int4 and blocks in the form `qdq` raise
            it to 21.
        quantize: `int4` or `int8`, for the weights of linear layers; the base model's are quantised
            once, adapters change their scales only.
        quantization_form: `matmulnbits`, ONNX Runtime's operator (the default), or `qdq`, which
            TensorRT takes too.
        block_size: how many weights along a layer's input share a scale; default: 32, or all of
            them for int8 in the form `qdq`.
        accuracy_level: in what MatMulNBits computes, 1: float32, 4: int8 activations (the default).
        quantize_activations: quantise what linear layers read, too (int8 in the form `qdq`).
        calibration: file of texts, at least 16, to measure the range of activations on, with the
            base model and with each adapter.
        exporter: `transformers`, portable graphs of any architecture; `genai`, graphs of
            onnxruntime-genai's builder for ONNX Runtime; `auto`, genai where its graph is the
            model's and has room for the adapters, else transformers.
        execution_provider: of ONNX Runtime, that the builder's graph is for: `cpu`, `cuda`, `dml`
            or `webgpu`.
        untie: give a scaled weight that is shared with another module a copy of its own (folded).
        allow_range: accept scales that the dtype rounds badly (switchable, bank).
        placement: without adapters, the modules that get slots: `attention`, `all` (the default)
            or a regular expression for module paths.
        max_labels: without adapters, how many labels a head may have; default: 16, or more if the
            checkpoint's own head has more.
        train_bias: without adapters, slots for trained biases too.
        force: replace an earlier output.
        trust_remote_code: run code that the base model brings.
        progress: called with the share done and what is being done.
        chosen: called with the exporter that was used, and why.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    options = OnnxOptions(
        model=model,
        task=task,
        dtype=dtype,
        opset=opset,
        exporter=exporter,
        execution_provider=execution_provider,
        quantize=quantize,
        quantization_form=quantization_form,
        block_size=block_size,
        accuracy_level=accuracy_level,
        quantize_activations=quantize_activations,
        calibration=calibration,
        untie=untie,
        allow_range=allow_range,
        placement=placement,
        max_labels=max_labels,
        train_bias=train_bias,
        force=force,
        trust_remote_code=trust_remote_code,
    )

    def tell(mode: Mode, exporter: Exporter, reason: str) -> None:
        chosen(exporter, reason)

    return export_modes(adapter, output, [mode], options, progress=progress, chosen=tell)[mode]


def export_modes(
    adapter: Sequence[str | Path],
    output: Path,
    mode: Sequence[Mode],
    options: OnnxOptions = _DEFAULTS,
    *,
    progress: Progress = silent,
    chosen: Chosen = lambda mode, exporter, reason: None,
) -> dict[Mode, Artifact]:
    """Export in several modes; the model is traced once where the modes allow it.

    Args:
        adapter: as for `export_onnx`; `folded` among the modes takes at most one.
        output: the directory of the artifact for one mode; for several the directory of
            `folded`, `switchable` and `bank`, which appear together or not at all.
        mode: one or more modes.
        options: as for `export_onnx`.
        progress: called with the share done and what is being done.
        chosen: called for each mode.

    Returns:
        The artifact of each mode, in the order given.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    modes = tuple(dict.fromkeys(mode))
    scheme = check_options(modes, options, len(adapter))
    adapters = _read(adapter, modes, options)
    source = find_base(options.model, adapters)
    inputs = (*map(source_of, adapter), source)
    places = Places(output, modes, "onnx", options.force, inputs)
    places.check()
    check_not_merged(source, adapters)
    check_undamaged(source)
    progress(0.05, f"loading {source}")
    texts = _find_texts(source, adapters, options)
    prepared = {
        kind: prepare_base(source, texts, adapters, kind, options.slots)
        for kind in dict.fromkeys(map(_kind, modes))
    }
    first = next(iter(prepared.values()))
    name = _dtype(first.base.model.dtype, adapters, modes, options)
    note = describe(scheme) + first.settled.note
    progress(0.2, f"tracing {type(first.base.model).__name__} in {name}{note}")
    produced = _produce(modes, prepared, adapters, options, scheme)
    for each in modes:
        chosen(each, produced[each].exporter, produced[each].reason)
    reasons = dict.fromkeys(f"{made.exporter}: {made.reason}" for made in produced.values())
    progress(0.8, f"writing {output}, the graph of {', '.join(reasons)}")
    exported = Exported(source, adapters, texts, name, scheme, options.execution_provider)
    with places.staged() as staged:
        written = {
            mode: write_artifact(exported, prepared[_kind(mode)], produced[mode], directory)
            for mode, directory in staged.items()
        }
    progress(1.0, f"wrote {output}")
    return {mode: artifact.at(places.by_name[mode]) for mode, artifact in written.items()}


def _kind(mode: Mode) -> Mode:
    """The mode whose base model `mode` uses: that of a bank is that of a switchable graph."""
    return "folded" if mode == "folded" else "switchable"


def _read(
    adapter: Sequence[str | Path], modes: Sequence[Mode], options: OnnxOptions
) -> list[Adapter]:
    """Read the adapters; refuse what the modes cannot do with them.

    Raises:
        UsageError: there are too many adapters to fold, or slots for none.
        AdapterError: an adapter changes nothing.
    """
    adapters = read_adapters(adapter)
    if "folded" in modes and len(adapters) > 1:
        raise UsageError(
            f"{len(adapters)} adapters are given, expected one to fold into the weights",
            remedy="Export with --mode switchable or bank to choose between them at run time.",
        )
    for read in adapters:
        check_identity(read)
    check_slots(options.slots, modes, adapters)
    return adapters


def _find_texts(
    source: str,
    adapters: Sequence[Adapter],
    options: OnnxOptions,
) -> TextFiles:
    trusted = options.trust_remote_code
    config = read_config(source, trust_remote_code=trusted)
    task = resolve_task(options.task, config.architectures or (), adapter_tasks(adapters))
    directories = {read.name: read.source for read in adapters}
    return TextFiles.find(source, task, directories, trust_remote_code=trusted)


def _dtype(
    own: torch.dtype, adapters: Sequence[Adapter], modes: Sequence[Mode], options: OnnxOptions
) -> Dtype:
    """The precision of the graphs; refuses scales that it rounds badly where they stay apart."""
    wanted = str(own).removeprefix("torch.") if options.dtype == "keep" else options.dtype
    name: Dtype = wanted  # type: ignore[assignment]
    options.quantising.check_dtype(name)
    if set(modes) != {"folded"} and not options.allow_range:
        for read in adapters:
            check_range(read, name)
    return name


def _produce(
    modes: Sequence[Mode],
    prepared: dict[Mode, PreparedBase],
    adapters: Sequence[Adapter],
    options: OnnxOptions,
    scheme: QuantizationEntry | None,
) -> dict[Mode, Produced]:
    """The graphs of each mode; those with slots first, whose trace serves the folded ones too."""
    first = next(iter(prepared.values())).base
    own = first.model.dtype
    with stage("calibrate") if options.calibration else nullcontext():
        trusted = options.trust_remote_code
        quantisation = quantisation_of(
            first, adapters, scheme, options.calibration, trust_remote_code=trusted
        )
    dtype = own if options.dtype == "keep" else getattr(torch, options.dtype)
    graph_options = GraphOptions(
        options.exporter, options.opset, options.untie, options.execution_provider, quantisation
    )
    shared, produced = SharedTrace(), {}
    for mode in sorted(modes, key=lambda mode: mode == "folded"):
        made = prepared[_kind(mode)]
        wanted = Wanted(made.base, made.slots, adapters, mode, dtype, shared)
        produced[mode] = produce(wanted, graph_options)
    return produced
