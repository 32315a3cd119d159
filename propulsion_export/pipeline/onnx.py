"""`onnx`: a base model and adapters become a graph, the adapters folded in or switchable."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.provenance import adapter_tasks, base_source, check_base
from propulsion_export.adapters.specification import check_identity, read_adapters, source_of
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.file_names import ADAPTERS, GRAPH_FILE, MANIFEST_FILE
from propulsion_export.artifacts.layout import check_range, labels_in, to_row
from propulsion_export.artifacts.manifest import (
    DEFAULT_OPSET,
    AdapterEntry,
    BaseEntry,
    Dtype,
    ExecutionProvider,
    Exporter,
    GraphEntry,
    Manifest,
    Mode,
)
from propulsion_export.artifacts.merged_base import check_not_merged
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.base_model.config import read_config, save_config
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.base_model.tasks import TaskName, resolve_task
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import UsageError
from propulsion_export.graph.build import ExportedGraphs
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.signature import signature
from propulsion_export.graph.slot_plan import default_labels
from propulsion_export.graph.slots import SlotOptions, slots_for
from propulsion_export.pipeline.base_room import load_with_room, resize_
from propulsion_export.pipeline.base_settings import settle_
from propulsion_export.pipeline.mode_options import check_mode_options
from propulsion_export.pipeline.producing import (
    ExporterChoice,
    GraphOptions,
    Produced,
    Wanted,
    produce,
)
from propulsion_export.pipeline.quantisation_options import (
    QuantisationOptions,
    QuantizationForm,
    QuantizedType,
)
from propulsion_export.pipeline.quantising import describe, quantisation_of
from propulsion_export.pipeline.text_files import TextFiles


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
    quantising = QuantisationOptions(
        quantize, quantization_form, block_size, accuracy_level, quantize_activations, calibration
    )
    scheme = quantising.scheme(execution_provider)
    quantising.check_dtype(dtype)
    quantising.check_untie(untie)
    check_mode_options(mode, untie=untie, allow_range=allow_range, adapters=len(adapter))
    adapters = read_adapters(adapter)
    _check_adapters(adapters, mode)
    slots = SlotOptions(placement, max_labels, train_bias)
    _check_slots(slots, mode, adapters)
    source = base_source(model, adapters)
    inputs = (*map(source_of, adapter), source)
    check_replaceable(output, marker=MANIFEST_FILE, force=force, inputs=inputs)
    check_not_merged(source, adapters)
    progress(0.05, f"loading {source}")
    config = read_config(source, trust_remote_code=trust_remote_code)
    task = resolve_task(task, config.architectures or (), adapter_tasks(adapters))
    directories = dict(zip((read.name for read in adapters), map(source_of, adapter), strict=True))
    texts = TextFiles.find(source, task, directories, trust_remote_code=trust_remote_code)
    base = load_with_room(source, task, adapters, mode, slots, trust_remote_code=trust_remote_code)
    fingerprint = fingerprint_of_model(base.model)
    check_base(fingerprint, source, adapters)
    resize_(base, adapters, mode, trust_remote_code=trust_remote_code)
    texts.check_tokens(base.model.config)
    wanted = base.model.dtype if dtype == "keep" else getattr(torch, dtype)
    name: Dtype = str(wanted).removeprefix("torch.")  # type: ignore[assignment]
    quantising.check_dtype(name)
    if mode != "folded" and not allow_range:
        _check_ranges(adapters, name)
    settled = settle_(base.model, adapters, texts, mode=mode, own_head=base.own_head)
    quantisation = quantisation_of(
        base, adapters, scheme, calibration, trust_remote_code=trust_remote_code
    )
    note = describe(scheme) + settled.note
    progress(0.2, f"tracing {type(base.model).__name__} in {name}{note}")
    filled = adapters or _slots(base, mode, slots)
    options = GraphOptions(exporter, opset, untie, execution_provider, quantisation)
    produced = produce(Wanted(base, filled, adapters, mode, wanted), options)
    graphs = produced.graphs
    chosen(produced.exporter, produced.reason)
    progress(0.8, f"writing {output}, the graph of {produced.exporter}: {produced.reason}")
    labels = default_labels(base, filled, graphs.layout)
    recorded = BaseEntry(source, fingerprint, labels, base.own_head, settled.base)
    with staged_directory(output, marker=MANIFEST_FILE, force=force, inputs=inputs) as directory:
        room = base.room if base.own_head else None
        classes = [labels_in(read, graphs.layout, labels, room) for read in adapters]
        entries = _entries(adapters, adapter, graphs.mode, classes, settled.adapters)
        entries = {
            one: replace(entry, chat_template=texts.template_of(one, graphs.mode))
            for one, entry in entries.items()
        }
        _write(produced, directory, name, entries)
        texts.write(directory, settled.settings, graphs.mode)
        texts.record(directory, settled.settings)
        if produced.write_config is not None:
            produced.write_config(directory)
        manifest = replace(
            _manifest(graphs, base, recorded, entries, name),
            exporter=produced.exporter,
            execution_provider=execution_provider,
            quantization=scheme,
        )
        written = Artifact.write(directory, manifest)
    progress(1.0, f"wrote {output}")
    return written.at(output)


def _check_ranges(adapters: Sequence[Adapter], dtype: Dtype) -> None:
    for adapter in adapters:
        check_range(adapter, dtype)


def _slots(base: BaseModel, mode: Mode, options: SlotOptions) -> list[Adapter]:
    """A stand-in for the adapters to come; none where the base model is exported alone."""
    if mode == "folded":
        return []
    return [slots_for(base, options)]


def _entries(
    adapters: Sequence[Adapter],
    specifications: Sequence[str | Path],
    mode: Mode,
    classes: Sequence[tuple[str, ...] | None],
    problem_types: Sequence[ProblemType | None],
) -> dict[str, AdapterEntry]:
    each = zip(adapters, specifications, classes, problem_types, strict=True)
    return {
        read.name: AdapterEntry(
            digest=read.digest,
            source=source_of(specification),
            size=read.size,
            file=f"{ADAPTERS}/{read.name}.safetensors" if mode == "switchable" else None,
            labels=labels,
            problem_type=problem_type,
        )
        for read, specification, labels, problem_type in each
    }


def _manifest(
    exported: ExportedGraphs,
    base: BaseModel,
    recorded: BaseEntry,
    entries: dict[str, AdapterEntry],
    dtype: Dtype,
) -> Manifest:
    graphs = {name: GraphEntry(*signature(program)) for name, program in exported.programs.items()}
    only = graphs.pop(GRAPH_FILE, GraphEntry((), ()))
    return Manifest(
        kind="onnx",
        mode=exported.mode,
        task=TaskName(base.task),
        dtype=dtype,
        base=recorded,
        adapters={} if exported.mode == "bank" else entries,
        inputs=only.inputs,
        outputs=only.outputs,
        graphs=graphs,
        layout=dict(exported.layout),
        tools=tool_versions(),
    )


def _check_adapters(adapters: Sequence[Adapter], mode: Mode) -> None:
    if mode == "folded" and len(adapters) > 1:
        raise UsageError(
            f"{len(adapters)} adapters are given, expected one to fold into the weights",
            remedy="Export with --mode switchable or bank to choose between them at run time.",
        )
    for adapter in adapters:
        check_identity(adapter)


def _check_slots(options: SlotOptions, mode: Mode, adapters: Sequence[Adapter]) -> None:
    """Refuse options for slots where the adapters themselves decide, or where there are none."""
    if not options.given or (mode != "folded" and not adapters):
        return
    found = "--mode folded" if mode == "folded" else "adapters given by -a"
    raise UsageError(
        *(f"{option}: is for slots without adapters, found {found}" for option in options.given),
        remedy="Leave it out." if adapters else "Export with --mode switchable or bank.",
    )


def _write(
    produced: Produced, directory: Path, dtype: str, entries: dict[str, AdapterEntry]
) -> None:
    """Everything in an artifact's directory but its manifest and what reads texts."""
    graphs = produced.graphs
    write_graphs(graphs.programs, directory)
    save_config(produced.model, directory, dtype, for_graph=True)
    if graphs.mode == "bank":
        _write_bank(graphs, directory, entries)
    else:
        _write_feeds(graphs, directory)


def _write_feeds(graphs: ExportedGraphs, directory: Path) -> None:
    from safetensors.numpy import save_file

    if graphs.feeds:
        (directory / ADAPTERS).mkdir()
    for name, feeds in graphs.feeds.items():
        save_file(dict(feeds), directory / ADAPTERS / f"{name}.safetensors")


def _write_bank(graphs: ExportedGraphs, directory: Path, entries: dict[str, AdapterEntry]) -> None:
    bank = Bank.create(directory, to_row(graphs.feeds[BASE_NAME], graphs.layout))
    for name, entry in entries.items():
        bank.add(name, to_row(graphs.feeds[name], graphs.layout), entry)
