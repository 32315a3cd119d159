"""`onnx`: a base model and adapters become a graph, the adapters folded in or switchable."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Artifact
from propulsion_export.bank import Bank
from propulsion_export.errors import UsageError
from propulsion_export.layout import check_range, labels_in, to_row
from propulsion_export.machine import tool_versions
from propulsion_export.manifest import (
    ADAPTERS,
    BASE_NAME,
    DEFAULT_OPSET,
    GRAPH_FILE,
    MANIFEST_FILE,
    AdapterEntry,
    BaseEntry,
    Dtype,
    GraphEntry,
    Manifest,
    Mode,
    Task,
)
from propulsion_export.output import check_replaceable, staged_directory
from propulsion_export.pipeline.inputs import (
    Progress,
    base_source,
    check_base,
    check_identity,
    labels_of,
    read_adapters,
    silent,
    source_of,
)
from propulsion_export.pipeline.making import (
    Made,
    default_labels,
    make_bank,
    make_folded,
    make_switchable,
)

if TYPE_CHECKING:
    from propulsion_export.base import Base


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
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Trace a base model with adapters to ONNX.

    Args:
        adapter: directories, or `NAME=DIR`; exactly one to fold, one or more to switch between.
        output: directory to write `model.onnx`, its weights, configuration, tokenizer and adapters.
        model: base model by path or name; default: the one the adapters name.
        mode: `folded`, the adapter in the weights; `switchable`, its scales an optional input;
            `bank`, each row of a batch chooses its own.
        task: which head the graph has; `auto`: the adapters'.
        dtype: `keep`, `float32`, `bfloat16` or `float16`, of weights and activations.
        opset: ONNX opset version.
        untie: give a scaled weight that is shared with another module a copy of its own (folded).
        allow_range: accept scales that the dtype rounds badly (switchable, bank).
        force: replace an earlier output.
        trust_remote_code: run code that the base model brings.
        progress: told how far it is.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    import torch

    from propulsion_export.model_fingerprint import fingerprint_of_model

    adapters = read_adapters(adapter)
    _check_count(adapters, mode)
    source = base_source(model, adapters)
    inputs = (*map(source_of, adapter), source)
    check_replaceable(output, marker=MANIFEST_FILE, force=force, inputs=inputs)
    progress(0.05, f"loading {source}")
    base = _load(source, task, adapters, mode, trust_remote_code=trust_remote_code)
    fingerprint = fingerprint_of_model(base.model)
    wanted = base.model.dtype if dtype == "keep" else getattr(torch, dtype)
    name: Dtype = str(wanted).removeprefix("torch.")  # type: ignore[assignment]
    check_base(fingerprint, source, adapters)
    progress(0.2, f"tracing {type(base.model).__name__} in {name}")
    if mode == "folded":
        made = make_folded(base, adapters[0], wanted, opset=opset, untie=untie)
    else:
        if not allow_range:
            for each in adapters:
                check_range(each, name)
        make = make_switchable if mode == "switchable" else make_bank
        made = make(base, adapters, wanted, opset=opset)
    progress(0.8, f"writing {output}")
    with staged_directory(output, marker=MANIFEST_FILE, force=force, inputs=inputs) as directory:
        recorded = BaseEntry(
            source,
            fingerprint,
            default_labels(base, adapters[0], made.layout),
            own_head=base.own_head,
        )
        entries = _entries(adapters, adapter, made, recorded)
        _write(made, base, directory, name)
        if mode == "bank":
            _write_bank(made, directory, entries)
        else:
            _write_feeds(made, directory)
        Artifact.write(directory, _manifest(made, base, recorded, entries, name))
    progress(1.0, f"wrote {output}")
    return Artifact.read(output)


def _entries(
    adapters: Sequence[Adapter],
    specifications: Sequence[str | Path],
    made: Made,
    base: BaseEntry,
) -> dict[str, AdapterEntry]:
    return {
        read.name: AdapterEntry(
            digest=read.digest,
            source=source_of(specification),
            size=read.size,
            file=f"{ADAPTERS}/{read.name}.safetensors" if made.mode == "switchable" else None,
            labels=labels_in(read, made.layout, base.labels),
        )
        for read, specification in zip(adapters, specifications, strict=True)
    }


def _manifest(
    made: Made, base: "Base", recorded: BaseEntry, entries: dict[str, AdapterEntry], dtype: Dtype
) -> Manifest:
    from propulsion_export.graph.finishing import signature

    graphs = {name: GraphEntry(*signature(program)) for name, program in made.programs.items()}
    only = graphs.pop(GRAPH_FILE, GraphEntry((), ()))
    return Manifest(
        kind="onnx",
        mode=made.mode,
        task=cast(Task, base.task),
        dtype=dtype,
        base=recorded,
        adapters={} if made.mode == "bank" else entries,
        inputs=only.inputs,
        outputs=only.outputs,
        graphs=graphs,
        layout=dict(made.layout),
        tools=tool_versions(),
    )


def _check_count(adapters: Sequence[Adapter], mode: Mode) -> None:
    if not adapters:
        raise UsageError("no adapter is given, expected at least one", remedy="Give it with -a.")
    if mode == "folded" and len(adapters) != 1:
        raise UsageError(
            f"{len(adapters)} adapters are given, expected one to fold into the weights",
            remedy="Export with --mode switchable or bank to choose between them at run time.",
        )
    for adapter in adapters:
        check_identity(adapter)


def _load(
    source: str, task: str, adapters: Sequence[Adapter], mode: Mode, *, trust_remote_code: bool
) -> "Base":
    """The base model with the head to fold, or with room for its own and the largest."""
    from propulsion_export.base import load_base, read_config, resolve_task

    config = read_config(source, trust_remote_code=trust_remote_code)
    task = resolve_task(task, config, adapters)
    base = load_base(source, task=task, trust_remote_code=trust_remote_code)
    for adapter in adapters:
        base.check_complete(adapter.modules)
    count = labels_of(adapters, base.label_parameters)
    if count is None:
        return base
    if mode == "folded" or not base.own_head:
        base.make_room_(count, adapters[0].labels or ())
    else:
        base.make_room_(max(count, len(base.own_labels)), base.own_labels)
    return base


def _write(made: Made, base: "Base", directory: Path, dtype: str) -> None:
    from propulsion_export.base import copy_tokenizer, save_config, save_generation_settings
    from propulsion_export.graph.files import write_graphs

    write_graphs(made.programs, directory)
    save_config(base.model, directory, dtype)
    copy_tokenizer(base.source, directory)
    save_generation_settings(base.source, base.task, directory)


def _write_feeds(made: Made, directory: Path) -> None:
    from safetensors.numpy import save_file

    if made.feeds:
        (directory / ADAPTERS).mkdir()
    for name, feeds in made.feeds.items():
        save_file(dict(feeds), directory / ADAPTERS / f"{name}.safetensors")


def _write_bank(made: Made, directory: Path, entries: dict[str, AdapterEntry]) -> None:
    bank = Bank.create(directory, to_row(made.feeds[BASE_NAME], made.layout))
    for name, entry in entries.items():
        bank.add(name, to_row(made.feeds[name], made.layout), entry)
