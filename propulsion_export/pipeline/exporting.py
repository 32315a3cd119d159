"""`onnx`: a base model and adapters become a graph, the adapters folded in or switchable."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Artifact, Tensors, numpy_dtype
from propulsion_export.errors import UsageError
from propulsion_export.layout import Layout, check_range, pack, plan_layout
from propulsion_export.machine import tool_versions
from propulsion_export.manifest import (
    ADAPTERS,
    BASE_NAME,
    BIASES_INPUT,
    DEFAULT_OPSET,
    MANIFEST_FILE,
    MODULES_INPUT,
    SCALES_INPUT,
    AdapterEntry,
    BaseEntry,
    Dtype,
    Manifest,
    Mode,
    Slot,
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
    with_room,
)
from propulsion_export.rounding import rounded
from propulsion_export.scales import Scale

if TYPE_CHECKING:
    import onnx_ir as ir

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
        mode: `folded`, the adapter in the weights; `switchable`, its scales an optional input.
        task: which head the graph has; `auto`: the adapters'.
        dtype: `keep`, `float32`, `bfloat16` or `float16`, of weights and activations.
        opset: ONNX opset version.
        untie: give a scaled weight that is shared with another module a copy of its own (folded).
        allow_range: accept scales that the dtype rounds badly (switchable).
        force: replace an earlier output.
        trust_remote_code: run code that the base model brings.
        progress: told how far it is.

    Raises:
        PropulsionExportError: as its subclasses say; nothing is left at `output` then.
    """
    import torch

    adapters = read_adapters(adapter)
    _check_count(adapters, mode)
    source = base_source(model, adapters)
    inputs = (*map(source_of, adapter), source)
    check_replaceable(output, marker=MANIFEST_FILE, force=force, inputs=inputs)
    progress(0.05, f"loading {source}")
    base, fingerprint = _load(source, task, adapters, trust_remote_code)
    wanted = base.model.dtype if dtype == "keep" else getattr(torch, dtype)
    name: Dtype = str(wanted).removeprefix("torch.")  # type: ignore[assignment]
    check_base(fingerprint, source, adapters)
    progress(0.2, f"tracing {type(base.model).__name__} in {name}")
    if mode == "folded":
        made = _folded(base, adapters[0], wanted, opset=opset, untie=untie)
    else:
        if not allow_range:
            for each in adapters:
                check_range(each, name)
        made = _switchable(base, adapters, wanted, opset=opset)
    progress(0.8, f"writing {output}")
    with staged_directory(output, marker=MANIFEST_FILE, force=force, inputs=inputs) as directory:
        _write(made, base, directory, name)
        entries = {
            read.name: AdapterEntry(
                digest=read.digest,
                source=source_of(specification),
                size=read.size,
                file=f"{ADAPTERS}/{read.name}.safetensors" if mode == "switchable" else None,
                labels=read.labels,
            )
            for read, specification in zip(adapters, adapter, strict=True)
        }
        from propulsion_export.graph.finishing import signature

        graph_inputs, graph_outputs = signature(made.program)
        manifest = Manifest(
            kind="onnx",
            mode=mode,
            task=cast(Task, base.task),
            dtype=name,
            base=BaseEntry(source, fingerprint, _default_labels(base, adapters, mode)),
            adapters=entries,
            inputs=graph_inputs,
            outputs=graph_outputs,
            layout=dict(made.layout),
            tools=tool_versions(),
        )
        Artifact.write(directory, manifest)
    progress(1.0, f"wrote {output}")
    return Artifact.read(output)


@dataclass(frozen=True)
class _Made:
    """A finished graph, and for a switchable one the layout and every adapter's feeds."""

    program: "ir.Model"
    layout: Layout
    feeds: dict[str, Tensors]


def _check_count(adapters: Sequence[Adapter], mode: Mode) -> None:
    if not adapters:
        raise UsageError("no adapter is given, expected at least one", remedy="Give it with -a.")
    if mode == "folded" and len(adapters) != 1:
        raise UsageError(
            f"{len(adapters)} adapters are given, expected one to fold into the weights",
            remedy="Export with --mode switchable to choose between them at run time.",
        )
    for adapter in adapters:
        check_identity(adapter)


def _load(
    source: str, task: str, adapters: Sequence[Adapter], trust_remote_code: bool
) -> tuple["Base", Any]:
    """The base model with room for the largest head, and its fingerprint."""
    from propulsion_export.base import (
        label_parameters,
        load_base,
        model_class_of,
        read_config,
        resolve_task,
    )
    from propulsion_export.model_fingerprint import fingerprint_of_model

    config = read_config(source, trust_remote_code=trust_remote_code)
    task = resolve_task(task, config, adapters)
    growing = label_parameters(
        model_class_of(task), config, task, trust_remote_code=trust_remote_code
    )
    count = labels_of(adapters, growing)
    largest = next((a.labels for a in adapters if a.labels and len(a.labels) == count), None)
    base = load_base(
        source, task=task, labels=largest or count, trust_remote_code=trust_remote_code
    )
    for adapter in adapters:
        base.check_complete(adapter.modules)
    return base, fingerprint_of_model(base.model)


def _folded(base: "Base", adapter: Adapter, dtype: Any, *, opset: int, untie: bool) -> _Made:
    from propulsion_export.fold.memory import fold_
    from propulsion_export.graph.finishing import optimise

    fold_(base.model, adapter, dtype=dtype, untie=untie)
    return _Made(optimise(_trace(base, opset)), {}, {})


def _switchable(base: "Base", adapters: Sequence[Adapter], dtype: Any, *, opset: int) -> _Made:
    from propulsion_export.attach import attached, check_fits
    from propulsion_export.graph.finishing import SetDefaults, optimise
    from propulsion_export.graph.packing import PackInitializers

    model = base.model
    order = [name for name, _ in model.named_modules()]
    order += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    room = labels_of(adapters, base.label_parameters)
    roomy = [with_room(adapter, room, base.label_parameters) for adapter in adapters]
    for adapter in roomy:
        check_fits(model, adapter)
    layout = plan_layout(roomy, order, base.label_parameters)
    defaults = _defaults(base, roomy[0], layout, numpy_dtype(str(dtype).removeprefix("torch.")))
    model.to(dtype)
    with attached(model, _placeholder(layout)):
        program = _trace(base, opset)
    for packed, slots in layout.items():
        PackInitializers(packed, {_initializer(packed, slot): slot for slot in slots})(program)
    program = optimise(program)
    SetDefaults(defaults)(program)
    feeds = {adapter.name: pack(adapter, layout, defaults) for adapter in adapters}
    return _Made(program, layout, {BASE_NAME: defaults, **feeds})


def _trace(base: "Base", opset: int) -> "ir.Model":
    from propulsion_export.graph.dimensions import NameDimensions
    from propulsion_export.sampling import input_names, trace_inputs
    from propulsion_export.trace import trace

    config = base.model.config
    names = input_names(type(base.model), config)
    program = trace(base.model, trace_inputs(names, config), opset=opset)
    NameDimensions()(program)
    return program


def _defaults(
    base: "Base", first: Adapter, layout: Layout, dtype: "np.dtype[Any]"
) -> dict[str, Any]:
    """What the packed inputs hold when nobody feeds them: the base model.

    A head that the base model's checkpoint does not have is the first adapter's.
    """
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    defaults = {}
    for packed, slots in layout.items():
        values = np.ones(sum(slot.length for slot in slots), np.float64)
        for slot in slots if packed != SCALES_INPUT else ():
            name = _initializer(packed, slot)
            own = parameters[name].double().numpy()
            if name in base.missing and name in first.modules:
                own = first.modules[name]
            values[slot.offset : slot.offset + slot.length] = own.reshape(-1)
        defaults[packed] = rounded(values, dtype)
    return defaults


def _default_labels(
    base: "Base", adapters: Sequence[Adapter], mode: Mode
) -> tuple[str, ...] | None:
    """Class names of the head that `_defaults` chose."""
    if mode != "switchable" or not base.label_parameters:
        return None
    if base.label_parameters & base.missing:
        return adapters[0].labels
    return base.own_labels


def _placeholder(layout: Layout) -> Adapter:
    """An adapter with a value of its own in every slot.

    The exporter makes one initializer of equal ones, so ones would leave too few of them.
    """
    chooser = np.random.default_rng(0)
    values = {
        packed: {slot: chooser.uniform(0.5, 1.5, slot.shape) for slot in slots}
        for packed, slots in layout.items()
    }
    scales = values.get(SCALES_INPUT, {})
    return Adapter(
        name="placeholder",
        scales={slot.path: Scale(drawn, slot.side) for slot, drawn in scales.items()},
        biases={slot.path: drawn for slot, drawn in values.get(BIASES_INPUT, {}).items()},
        modules={slot.path: drawn for slot, drawn in values.get(MODULES_INPUT, {}).items()},
    )


def _initializer(packed: str, slot: Slot) -> str:
    """What a slot's tensor is called in the traced graph."""
    from propulsion_export.attach import BUFFERS

    if packed == SCALES_INPUT:
        return f"{slot.path}.{BUFFERS[slot.side]}"
    return f"{slot.path}.bias" if packed == BIASES_INPUT else slot.path


def _write(made: _Made, base: "Base", directory: Path, dtype: str) -> None:
    from safetensors.numpy import save_file

    from propulsion_export.base import copy_tokenizer, save_config
    from propulsion_export.graph.files import write_graph

    write_graph(made.program, directory)
    save_config(base.model, directory, dtype)
    copy_tokenizer(base.source, directory)
    if made.feeds:
        (directory / ADAPTERS).mkdir()
    for name, feeds in made.feeds.items():
        save_file(dict(feeds), directory / ADAPTERS / f"{name}.safetensors")
