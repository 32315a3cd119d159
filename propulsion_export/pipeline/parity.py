"""`parity`: does an artifact compute what the PyTorch base model with its adapters computes?"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.specification import read_adapters, source_of
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import AdapterError, UnavailableError, unknown_adapters
from propulsion_export.graph.signature import check_signature
from propulsion_export.parity.cases import judge
from propulsion_export.parity.drawn import draw_adapter, feeds_for_drawn
from propulsion_export.parity.generation import judge_generation
from propulsion_export.parity.inputs import load_recorded_base, make_batches
from propulsion_export.parity.mixing import judge_mixed
from propulsion_export.parity.oracle import GREEDY_STEPS, compute_oracle
from propulsion_export.parity.reports.html import to_html
from propulsion_export.parity.reports.report import Check, NotRun, ParityReport
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import Candidate, replaying
from propulsion_export.runners.opening import REFERENCE_LENGTH, choose_runner, open_candidate

# Of a bank, at once: what PyTorch computes of each in float64 takes its time.
MOST_ADAPTERS = 16
REPORT_FILE: Literal["parity.json"] = "parity.json"


def check_parity(
    artifact: Path,
    *,
    model: str | None = None,
    adapter: Sequence[str | Path] = (),
    runner: str = "auto",
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
        adapter: where its adapters lie now, `NAME=DIR`; default: where the artifact says. Of more
            than 16 in a bank these are judged, and others drawn with the seed.
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
        given = [path for path in (artifact, model, inputs) if path]
        given += map(source_of, adapter)
        check_replaceable(report, marker=REPORT_FILE, force=force, inputs=given)
    read = Artifact.read(artifact)
    if report is not None:
        recorded = [entry.source for entry in read.adapters.values()]
        recorded.append(read.manifest.base.source)
        check_replaceable(report, marker=REPORT_FILE, force=force, inputs=recorded)
    check_signature(read)
    name = choose_runner(read, runner)
    adapters = _adapters(read, adapter, seed)
    drawn = None if adapters else draw_adapter(read, seed)
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
        candidate = open_candidate(read, name, trust_remote_code=trust_remote_code)
        judged = [drawn] if drawn else adapters
        base = load_recorded_base(read, judged, model, trust_remote_code=trust_remote_code)
        short = name == "reference"
        batches = make_batches(base, inputs, seed, short=short)
        steps = REFERENCE_LENGTH if short else GREEDY_STEPS
        feeds = feeds_for_drawn(read, drawn) if drawn else None
        subjects = compute_oracle(read, base, judged, batches, progress, steps=steps, feeds=feeds)
        progress(0.7, f"running {name}")
        checks = _judge(read, subjects, batches, candidate)
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        verdict = replace(blank, inputs=rows, checks=(*_told(read, adapters, seed), *checks))
    except UnavailableError as error:
        verdict = replace(blank, not_run=(NotRun(f"{name} on {artifact}", str(error)),))
    if report is not None:
        write_report(verdict, report, force=force)
    progress(1.0, verdict.verdict)
    return verdict


def _judge(
    read: Artifact, subjects: Sequence[Subject], batches: Sequence[Tensors], run: Candidate
) -> list[Check]:
    """All cases; generative models are judged as runners of whole sequences first."""
    whole = run if callable(run) else replaying(run)
    checks = list(judge(subjects, batches, whole, read.manifest.dtype))
    allowed = {
        check.adapter: {errors.output: errors.allowed for errors in check.outputs}
        for check in checks
        if check.case == "parity" and check.outputs
    }
    if not callable(run):
        judged = [subject for subject in subjects if subject.name in allowed]
        for subject in judged:
            bound = allowed[subject.name][LOGITS]
            checks += judge_generation(subject, batches[0], run, bound)
    if read.manifest.mode == "bank" and allowed:
        checks.append(judge_mixed(subjects, batches, whole, allowed))
    return checks


def write_report(verdict: ParityReport, directory: Path, *, force: bool = False) -> None:
    """Write `parity.json` and the self-contained `parity.html` into a directory of their own."""
    with staged_directory(directory, marker=REPORT_FILE, force=force) as staged:
        (staged / "parity.html").write_text(to_html(verdict), encoding="utf-8")
        (staged / REPORT_FILE).write_text(verdict.to_json(), encoding="utf-8")


def _adapters(artifact: Artifact, given: Sequence[str | Path], seed: int) -> list[Adapter]:
    """The artifact's adapters, read where they lie now, each proven to be the recorded one.

    Of a bank with many, those that are given and some more.
    """
    entries = artifact.adapters
    if len(entries) == 1 and len(given) == 1 and "=" not in str(given[0]):
        given = [f"{next(iter(entries))}={given[0]}"]
    told = {adapter.name: adapter for adapter in read_adapters(given)}
    if unknown := told.keys() - entries.keys():
        raise unknown_adapters(artifact.directory, sorted(unknown), sorted(entries))
    adapters = []
    for name in _sample(list(entries), told, seed):
        entry = entries[name]
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


def _sample(names: Sequence[str], given: Collection[str], seed: int) -> list[str]:
    """All names, or of more than a verdict judges the given ones and some more, drawn."""
    others = [name for name in names if name not in given]
    room = max(0, MOST_ADAPTERS - len(given))
    drawn = {*given, *random.Random(seed).sample(others, min(room, len(others)))}
    return [name for name in names if name in drawn]


def _told(artifact: Artifact, adapters: Sequence[Adapter], seed: int) -> Iterator[Check]:
    """How many adapters are judged, where not all, and whether their classes have their names."""
    entries = artifact.adapters
    if len(adapters) < len(entries):
        yield Check(
            "sample",
            "all",
            True,
            f"{len(adapters)} of {len(entries)} adapters are judged, drawn with seed {seed}; "
            "-a NAME=DIR judges those that it names",
        )
    for adapter in adapters:
        told = entries[adapter.name].labels
        expected = labels_in(adapter, artifact.manifest.layout, artifact.manifest.base.labels)
        if expected is None and told is None:
            continue
        same = expected == told
        detail = "the artifact names the classes as the adapter does"
        if not same:
            detail = f"the artifact names the classes {told}, the adapter {expected}"
        yield Check("labels", adapter.name, same, detail)
