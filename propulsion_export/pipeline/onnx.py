"""`onnx`: a base model and adapters become a graph, the adapters folded in or switchable."""

from collections.abc import Sequence
from pathlib import Path

import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import labels_of
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.own_tokenizer import tokenizer_source
from propulsion_export.adapters.provenance import adapter_tasks, base_source, check_base
from propulsion_export.adapters.sentence_source import sentence_source
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
    GraphEntry,
    Manifest,
    Mode,
)
from propulsion_export.artifacts.merged_base import check_not_merged
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.base_model.config import read_config, save_config, save_generation_settings
from propulsion_export.base_model.loading import BaseModel, load_base, model_class_of
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.base_model.model_inputs import check_inputs
from propulsion_export.base_model.recorded_tokenizer import record_tokenizer
from propulsion_export.base_model.resizing import resize_embeddings_, resized_rows
from propulsion_export.base_model.sentence_modules import copy_sentence_pipeline
from propulsion_export.base_model.settings import ProblemType, write_tokenizer_settings
from propulsion_export.base_model.tasks import TASKS, TaskName, resolve_task
from propulsion_export.base_model.token_ids import check_token_ids
from propulsion_export.base_model.tokenizer import copy_tokenizer, tokenizer_to_record
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import AdapterError, UsageError
from propulsion_export.graph.build import (
    ExportedGraphs,
    build_bank,
    build_folded,
    build_switchable,
    default_labels,
)
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.sample_outputs import check_computable
from propulsion_export.graph.signature import signature
from propulsion_export.graph.slots import SlotOptions, head_parameters, slots_for
from propulsion_export.pipeline.base_settings import settle_
from propulsion_export.pipeline.mode_options import check_mode_options

DEFAULT_MAX_LABELS = 16


def export_onnx(
    adapter: Sequence[str | Path],
    output: Path,
    *,
    model: str | None = None,
    mode: Mode = "folded",
    task: str = "auto",
    dtype: str = "keep",
    opset: int = DEFAULT_OPSET,
    untie: bool = False,
    allow_range: bool = False,
    placement: str | None = None,
    max_labels: int | None = None,
    train_bias: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
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
        opset: ONNX opset version.
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

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
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
    reads = _tokenizer_source(adapters, adapter, source)
    tokenizer = tokenizer_to_record(reads, trust_remote_code=trust_remote_code)
    base = _load(source, task, adapters, mode, slots, trust_remote_code=trust_remote_code)
    sentence = sentence_source(source, base.task, list(map(source_of, adapter)))
    fingerprint = fingerprint_of_model(base.model)
    check_base(fingerprint, source, adapters)
    _resize_(base, adapters, mode, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        check_token_ids(reads, tokenizer, base.model.config.to_dict())
    wanted = base.model.dtype if dtype == "keep" else getattr(torch, dtype)
    name: Dtype = str(wanted).removeprefix("torch.")  # type: ignore[assignment]
    if mode != "folded" and not allow_range:
        _check_ranges(adapters, name)
    settled = settle_(
        base.model, adapters, base.task, reads, tokenizer, mode=mode, own_head=base.own_head
    )
    check_computable(base)
    progress(0.2, f"tracing {type(base.model).__name__} in {name}{settled.note}")
    filled = adapters or _slots(base, mode, slots)
    graphs = _build(base, filled, adapters, mode, wanted, opset=opset, untie=untie)
    progress(0.8, f"writing {output}")
    labels = default_labels(base, filled, graphs.layout)
    recorded = BaseEntry(source, fingerprint, labels, base.own_head, settled.base)
    with staged_directory(output, marker=MANIFEST_FILE, force=force, inputs=inputs) as directory:
        room = base.room if base.own_head else None
        classes = [labels_in(read, graphs.layout, labels, room) for read in adapters]
        entries = _entries(adapters, adapter, graphs.mode, classes, settled.adapters)
        _write(graphs, base, directory, name, entries)
        copy_tokenizer(reads, directory)
        write_tokenizer_settings(directory, settled.settings)
        if reads != source or settled.settings.tokenizer:
            tokenizer = tokenizer_to_record(str(directory), trust_remote_code=trust_remote_code)
        record_tokenizer(tokenizer, directory)
        if sentence is not None:
            copy_sentence_pipeline(sentence, directory)
        written = Artifact.write(directory, _manifest(graphs, base, recorded, entries, name))
    progress(1.0, f"wrote {output}")
    return written.at(output)


def _tokenizer_source(
    adapters: Sequence[Adapter], specifications: Sequence[str | Path], base: str
) -> str:
    """Where the tokenizer to copy is: beside an adapter that brings its own, else at `base`."""
    directories = {
        read.name: Path(source_of(specification))
        for read, specification in zip(adapters, specifications, strict=True)
    }
    return tokenizer_source(directories, base)


def _resize_(
    base: BaseModel, adapters: Sequence[Adapter], mode: Mode, *, trust_remote_code: bool
) -> None:
    """Give the base model as many embeddings as the adapter to fold was trained with."""
    for adapter in adapters:
        rows = resized_rows(
            adapter.name,
            adapter.modules,
            adapter.frozen,
            model_class_of(base.task),
            base.model.config,
            trust_remote_code=trust_remote_code,
        )
        if rows is not None and mode != "folded":
            raise AdapterError(
                f"adapter {adapter.name}: its embeddings were resized to {rows} rows, expected the "
                f"base model's own with --mode {mode}",
                remedy="Export it on its own with --mode folded.",
            )
        if rows is not None:
            resize_embeddings_(base.model, rows)


def _check_ranges(adapters: Sequence[Adapter], dtype: Dtype) -> None:
    for adapter in adapters:
        check_range(adapter, dtype)


def _slots(base: BaseModel, mode: Mode, options: SlotOptions) -> list[Adapter]:
    """A stand-in for the adapters to come; none where the base model is exported alone."""
    if mode == "folded":
        return []
    return [slots_for(base, options)]


def _build(
    base: BaseModel,
    slots: Sequence[Adapter],
    adapters: Sequence[Adapter],
    mode: Mode,
    dtype: torch.dtype,
    *,
    opset: int,
    untie: bool,
) -> ExportedGraphs:
    if mode == "folded":
        first = next(iter(adapters), None)
        return build_folded(base, first, dtype, opset=opset, untie=untie)
    build = build_switchable if mode == "switchable" else build_bank
    return build(base, slots, adapters, dtype, opset=opset)


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


def _load(
    source: str,
    task: str,
    adapters: Sequence[Adapter],
    mode: Mode,
    slots: SlotOptions,
    *,
    trust_remote_code: bool,
) -> BaseModel:
    """The base model with the head to fold, or with room for its own and the largest."""
    config = read_config(source, trust_remote_code=trust_remote_code)
    task = resolve_task(task, config.architectures or (), adapter_tasks(adapters))
    base = load_base(source, task=task, trust_remote_code=trust_remote_code)
    check_inputs(type(base.model), base.model.config, source, generates=TASKS[task].generates)
    for adapter in adapters:
        base.check_complete(adapter.modules)
    if not adapters:
        _make_room_for_slots_(base, mode, slots)
        return base
    count = labels_of(adapters, base.label_parameters)
    if count is None:
        return base
    if mode == "folded" or not base.own_head:
        same = base.own_head and count == len(base.own_labels)
        base.make_room_(count, adapters[0].labels or (base.own_labels if same else ()))
    else:
        base.make_room_(max(count, len(base.own_labels)), base.own_labels)
    return base


def _make_room_for_slots_(base: BaseModel, mode: Mode, slots: SlotOptions) -> None:
    """Make the head as wide as adapters to come may need; without slots it must be complete."""
    if mode == "folded" or not base.label_parameters:
        base.check_complete(())
        if slots.max_labels is not None:
            raise UsageError(
                f"--max-labels: {base.task} has no head that counts labels",
                remedy="Leave it out, or give another --task.",
            )
        return
    base.check_complete(head_parameters(base))
    own = base.own_labels if base.own_head else ()
    if slots.max_labels is not None and slots.max_labels < len(own):
        raise UsageError(
            f"--max-labels: {slots.max_labels}, expected at least the {len(own)} labels of the "
            "base model's own head"
        )
    base.make_room_(max(slots.max_labels or DEFAULT_MAX_LABELS, len(own)), own)


def _write(
    graphs: ExportedGraphs,
    base: BaseModel,
    directory: Path,
    dtype: str,
    entries: dict[str, AdapterEntry],
) -> None:
    """Everything in an artifact's directory but its manifest and tokenizer."""
    write_graphs(graphs.programs, directory)
    save_config(base.model, directory, dtype, for_graph=True)
    save_generation_settings(base.source, base.task, directory)
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
