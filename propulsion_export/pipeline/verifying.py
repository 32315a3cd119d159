"""`parity`: does an artifact compute what the PyTorch base model with its adapters computes?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Artifact, Tensors
from propulsion_export.errors import AdapterError, UnavailableError, UsageError
from propulsion_export.machine import tool_versions
from propulsion_export.manifest import BASE_NAME, MODULES_INPUT
from propulsion_export.output import check_replaceable, staged_directory
from propulsion_export.parity.cases import Subject, judge
from propulsion_export.parity.report import Check, NotRun, ParityReport
from propulsion_export.pipeline.inputs import (
    Progress,
    check_base,
    labels_of,
    read_adapters,
    read_texts,
    silent,
    with_room,
    without_scales,
)
from propulsion_export.pipeline.running import (
    REFERENCE_LENGTH,
    RunnerName,
    choose_runner,
    open_runner,
)

if TYPE_CHECKING:
    from propulsion_export.base import Base


def check_parity(
    artifact: Path,
    *,
    model: str | None = None,
    adapter: Sequence[str | Path] = (),
    runner: RunnerName = "auto",
    inputs: Path | None = None,
    seed: int = 0,
    report: Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an artifact with PyTorch and return the verdict; `report.passed` is the answer.

    Args:
        artifact: directory of a merged checkpoint, an ONNX export or an engine.
        model: where the base model lies now; default: where the artifact says.
        adapter: where its adapters lie now, `NAME=DIR`; default: where the artifact says.
        runner: what runs it; `auto`: what fits its kind and dtype.
        inputs: texts to compare on, a line each (.txt) or JSONL with `text`; default: made tokens.
        seed: of the tokens made.
        report: directory to write `parity.json` and `parity.html` to.
        force: replace an earlier report.
        trust_remote_code: run code that the base model brings.
        progress: told how far it is.

    Raises:
        PropulsionExportError: nothing could be compared because an input is damaged, missing or
            does not belong together. What this machine cannot run is in `report.not_run`.
    """
    if report is not None:
        check_replaceable(report, force=force)
    read = Artifact.read(artifact)
    name = choose_runner(read, runner)
    adapters = _adapters(read, adapter)
    blank = ParityReport(
        artifact=str(artifact),
        kind=read.manifest.kind,
        dtype=read.manifest.dtype,
        runner=name,
        inputs=0,
        seed=None if inputs else seed,
        tools=tool_versions(),
    )
    try:
        candidate = open_runner(read, name)
    except UnavailableError as error:
        verdict = replace(blank, not_run=(NotRun(f"{name} on {artifact}", str(error)),))
    else:
        progress(0.1, "computing the oracle in float64")
        batches, subjects = _ask_torch(
            read, adapters, model, inputs, seed, name, trust_remote_code, progress
        )
        progress(0.7, f"running {name}")
        checks = judge(subjects, batches, candidate, read.manifest.dtype)
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        verdict = replace(blank, inputs=rows, checks=(*_labels(read, adapters), *checks))
    if report is not None:
        write_report(verdict, report, force=force)
    progress(1.0, verdict.verdict)
    return verdict


def write_report(verdict: ParityReport, directory: Path, *, force: bool = False) -> None:
    """Write `parity.json` and the self-contained `parity.html` into a directory of their own."""
    from propulsion_export.parity.html import to_html

    with staged_directory(directory, force=force) as staged:
        (staged / "parity.html").write_text(to_html(verdict), encoding="utf-8")
        (staged / "parity.json").write_text(verdict.to_json(), encoding="utf-8")


def _adapters(artifact: Artifact, given: Sequence[str | Path]) -> list[Adapter]:
    """The artifact's adapters, read where they lie now, each proven to be the recorded one."""
    entries = artifact.manifest.adapters
    if len(entries) == 1 and len(given) == 1 and "=" not in str(given[0]):
        given = [f"{next(iter(entries))}={given[0]}"]
    told = {adapter.name: adapter for adapter in read_adapters(given)}
    if unknown := told.keys() - entries.keys():
        raise UsageError(
            f"-a {min(unknown)}: the artifact has no such adapter, expected one of "
            f"{', '.join(sorted(entries))}"
        )
    adapters = []
    for name, entry in entries.items():
        if name not in told and not Path(entry.source).is_dir():
            raise AdapterError(
                f"adapter {name}: is no longer at {entry.source}",
                remedy=f"Say where it lies: -a {name}=DIR.",
            )
        adapter = told.get(name) or Adapter.read(entry.source, name)
        if adapter.digest != entry.digest:
            raise AdapterError(
                f"adapter {name}: is not the one the artifact was made from ({adapter.digest[:19]}…"
                f", expected {entry.digest[:19]}…)",
                remedy=f"Export again, or say where it lies: -a {name}=DIR.",
            )
        adapters.append(adapter)
    return adapters


def _labels(artifact: Artifact, adapters: Sequence[Adapter]) -> Iterator[Check]:
    for adapter in adapters:
        told = artifact.manifest.adapters[adapter.name].labels
        if adapter.labels is None and told is None:
            continue
        same = adapter.labels == told
        detail = "the artifact names the classes as the adapter does"
        if not same:
            detail = f"the artifact names the classes {told}, the adapter {adapter.labels}"
        yield Check("labels", adapter.name, same, detail)


@dataclass(frozen=True)
class _State:
    """One state of the model to be compared: an adapter to attach, and one to measure against."""

    name: str
    attach: Adapter
    unscaled: Adapter | None


def _ask_torch(
    artifact: Artifact,
    adapters: Sequence[Adapter],
    model: str | None,
    inputs: Path | None,
    seed: int,
    runner: str,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[tuple[Tensors, ...], list[Subject]]:
    """What PyTorch computes in float64 and at the artifact's precision, for every state."""
    import torch

    base = _load_base(artifact, adapters, model, trust_remote_code)
    batches = _batches(base, inputs, seed, short=runner == "reference")
    states = _states(artifact, base, adapters)
    base.model.double()
    oracles = [_outputs(base, state.attach, batches) for state in states]
    unscaled = [
        None if state.unscaled is None else _outputs(base, state.unscaled, batches)
        for state in states
    ]
    progress(0.5, f"measuring PyTorch's own error in {artifact.manifest.dtype}")
    base.model.to(getattr(torch, artifact.manifest.dtype))
    references = [_outputs(base, state.attach, batches) for state in states]
    subjects = [
        Subject(state.name, oracle, reference, without, _feeds(artifact, state.name))
        for state, oracle, reference, without in zip(
            states, oracles, references, unscaled, strict=True
        )
    ]
    return batches, subjects


def _feeds(artifact: Artifact, name: str) -> Tensors:
    if artifact.manifest.mode == "folded":
        return {}
    # ONNX has defaults inside the graph, and the base case is there to prove them.
    bare = name == BASE_NAME and artifact.manifest.kind == "onnx"
    return {} if bare else artifact.feeds(name)


def _load_base(
    artifact: Artifact, adapters: Sequence[Adapter], model: str | None, trust_remote_code: bool
) -> "Base":
    from propulsion_export.base import label_parameters, load_base, model_class_of, read_config
    from propulsion_export.errors import BaseModelError
    from propulsion_export.model_fingerprint import fingerprint_of_model

    manifest = artifact.manifest
    source = model or manifest.base.source
    config = read_config(source, trust_remote_code=trust_remote_code)
    growing = label_parameters(
        model_class_of(manifest.task), config, manifest.task, trust_remote_code=trust_remote_code
    )
    base = load_base(
        source,
        task=manifest.task,
        labels=labels_of(adapters, growing),
        trust_remote_code=trust_remote_code,
    )
    for adapter in adapters:
        base.check_complete(adapter.modules)
    fingerprint = fingerprint_of_model(base.model)
    if difference := manifest.base.fingerprint.difference(fingerprint):
        raise BaseModelError(
            f"{source}: is not the base model the artifact was made from ({difference})",
            remedy="Say where that lies with -m.",
        )
    check_base(fingerprint, source, adapters)
    return base


def _states(artifact: Artifact, base: "Base", adapters: Sequence[Adapter]) -> list[_State]:
    room = labels_of(adapters, base.label_parameters)
    roomy = [with_room(adapter, room, base.label_parameters) for adapter in adapters]
    states = [_State(adapter.name, adapter, without_scales(adapter)) for adapter in roomy]
    if artifact.manifest.mode == "switchable":
        states.append(_State(BASE_NAME, _default_head(artifact, base), None))
    return states


def _default_head(artifact: Artifact, base: "Base") -> Adapter:
    """What stands in for a head that the base model's checkpoint does not have.

    The artifact's own default: the adapter that it came from may be gone by now.
    """
    flat = artifact.feeds(BASE_NAME).get(MODULES_INPUT)
    slots = artifact.manifest.layout.get(MODULES_INPUT, ())
    modules = {
        slot.path: flat[slot.offset : slot.offset + slot.length].reshape(slot.shape).astype(float)
        for slot in slots
        if flat is not None and slot.path in base.missing
    }
    return Adapter(BASE_NAME, scales={}, modules=modules)


def _batches(base: "Base", inputs: Path | None, seed: int, *, short: bool) -> tuple[Tensors, ...]:
    from propulsion_export.sampling import input_names, parity_inputs, text_inputs

    config = base.model.config
    names = input_names(type(base.model), config)
    if inputs is None:
        longest = REFERENCE_LENGTH if short else None
        return parity_inputs(names, config, seed=seed, longest=longest)
    from propulsion_export.base import read_tokenizer

    tokenizer = read_tokenizer(base.source)
    if tokenizer is None:
        raise UsageError(f"--inputs: {base.source} has no tokenizer to read texts with")
    texts = read_texts(inputs)
    limit = int(getattr(config, "max_position_embeddings", 512))
    return tuple(
        text_inputs(names, tokenizer, texts[start : start + 4], limit)
        for start in range(0, len(texts), 4)
    )


def _outputs(base: "Base", adapter: Adapter, batches: Sequence[Tensors]) -> tuple[Tensors, ...]:
    from propulsion_export.attach import attached
    from propulsion_export.runners import torch_runner

    with attached(base.model, adapter), _deterministic():
        run = torch_runner(base.model)
        return tuple(run(batch) for batch in batches)


@contextmanager
def _deterministic() -> Iterator[None]:
    """TF32 would make PyTorch's own error, and with it the tolerance, a thousand times larger."""
    import torch

    before: Any = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
