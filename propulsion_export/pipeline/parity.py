"""`parity`: does an artifact compute what the PyTorch base model with its adapters computes?"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.sentence_source import sentence_source
from propulsion_export.adapters.specification import read_adapters, source_of
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import AdapterError, UnavailableError, UsageError, unknown_adapters
from propulsion_export.graph.signature import check_signature
from propulsion_export.parity.cases import judge
from propulsion_export.parity.devices import check_device, choose_compute
from propulsion_export.parity.drawn import draw_adapters, feeds_for_drawn
from propulsion_export.parity.embeddings import check_pooling, embedding, with_embeddings
from propulsion_export.parity.evidence import Evidence, FurtherCases, allowed_errors
from propulsion_export.parity.generation import continue_greedily, judge_generative
from propulsion_export.parity.inputs import load_recorded_base, make_batches
from propulsion_export.parity.mixing import judge_mixed
from propulsion_export.parity.oracle import GREEDY_STEPS, compute_oracle
from propulsion_export.parity.quantised.verdict import (
    check_price_option,
    exact_candidate,
    judge_price,
    quantise_base_,
)
from propulsion_export.parity.reports.html import to_html
from propulsion_export.parity.reports.report import Check, NotRun, ParityReport
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import Candidate
from propulsion_export.runners.opening import REFERENCE_LENGTH, choose_runner, open_candidate

# The most adapters of a bank that one verdict judges: PyTorch computes each in float64.
MOST_ADAPTERS = 16
_FURTHER_CASES: tuple[FurtherCases, ...] = (judge_generative, judge_mixed)
REPORT_FILE: Literal["parity.json"] = "parity.json"


def check_parity(
    artifact: Path,
    *,
    model: str | None = None,
    adapter: Sequence[str | Path] = (),
    runner: str = "auto",
    inputs: Path | None = None,
    seed: int | None = None,
    report: Path | None = None,
    force: bool = False,
    device: str = "auto",
    low_memory: bool = False,
    max_kl: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an artifact with PyTorch and return the verdict; `report.passed` is the answer.

    Args:
        artifact: directory of a merged checkpoint, an ONNX export or an engine.
        model: where the base model is now; default: where it was when the artifact was made.
        adapter: where adapters are now, `NAME=DIR`; default: where they were. If a bank has more
            than 16, these are judged and others chosen at random.
        runner: the runtime; `auto`: the default for its kind and dtype.
        inputs: file of texts to compare on, one per line (.txt) or JSONL with `text`; default:
            random tokens.
        seed: for the random tokens, the choice of adapters, and the random adapter that stands in
            where the artifact has slots and no adapter; default: 0.
        report: directory to write `parity.json` and `parity.html` to.
        force: replace an earlier report.
        device: where PyTorch computes: `cpu`, `cuda`, or `auto`, a GPU with room for the model if
            there is one.
        low_memory: let PyTorch compute with one layer of the model in memory at a time.
        max_kl: the most that quantised weights may cost an adapter or the base model, in nats: the
            mean Kullback-Leibler divergence from the unquantised model. Default: any, only told.
        trust_remote_code: run code that the base model brings.
        progress: called with the share done and what is being done.

    Raises:
        UsageError: an option is given that does nothing with the others, or cannot be used with
            the model.
        UnavailableError: there is no GPU for `device="cuda"`.
        PropulsionExportError: nothing could be compared because an input is damaged, missing or
            does not belong together. What this machine cannot run is in `report.not_run`.
    """
    if force and report is None:
        raise UsageError("--force: does nothing without --report", remedy="Leave it out.")
    given = (artifact, model, inputs, *map(source_of, adapter))
    _check_report_place(report, [path for path in given if path], force=force)
    read = Artifact.read(artifact)
    seed = _effective_seed(read, seed, inputs)
    if report is not None:
        _check_report_place(report, _recorded_sources(read), force=force)
    check_signature(read)
    check_price_option(read, max_kl)
    name = choose_runner(read, runner)
    check_device(device)
    adapters = _adapters(read, adapter, seed)
    verdict = ParityReport(
        artifact=str(artifact),
        kind=read.manifest.kind,
        dtype=read.manifest.dtype,
        runner=name,
        inputs=0,
        seed=None if inputs and not _is_random(read) else seed,
        tools=tool_versions(),
    )
    options = _Options(adapter, model, inputs, seed, device, low_memory, max_kl, trust_remote_code)
    try:
        verdict = _compare(read, verdict, adapters, options, progress)
    except UnavailableError as error:
        verdict = replace(verdict, not_run=(NotRun(f"{name} on {artifact}", str(error)),))
    if report is not None:
        write_report(verdict, report, force=force)
    progress(1.0, verdict.verdict)
    return verdict


@dataclass(frozen=True)
class _Options:
    """What to compare with and how; the arguments of `check_parity` of these names."""

    given: Sequence[str | Path]
    model: str | None
    inputs: Path | None
    seed: int
    device: str
    low_memory: bool
    max_kl: float | None
    trust_remote_code: bool


def _compare(
    read: Artifact,
    verdict: ParityReport,
    adapters: Sequence[Adapter],
    options: _Options,
    progress: Progress,
) -> ParityReport:
    """Compute both sides and judge every case.

    Raises:
        UnavailableError: this machine cannot run the artifact.
    """
    name, seed, trust = verdict.runner, options.seed, options.trust_remote_code
    candidate = open_candidate(read, name, trust_remote_code=trust)
    exact = exact_candidate(read, name, candidate, trust_remote_code=trust)
    run = candidate if exact is None else exact
    drawn = [] if adapters or read.manifest.mode == "folded" else draw_adapters(read, seed)
    judged = drawn or adapters
    base = load_recorded_base(read, judged, options.model, trust_remote_code=trust)
    batches = make_batches(
        base,
        options.inputs,
        seed,
        short=name == "reference",
        trust_remote_code=trust,
        directory=read.directory,
    )
    compute = choose_compute(base, options.device, low_memory=options.low_memory)
    quantised = quantise_base_(read, base, judged, batches, compute)
    subjects = compute_oracle(
        read,
        base,
        judged,
        batches,
        progress,
        steps=REFERENCE_LENGTH if name == "reference" else GREEDY_STEPS,
        feeds=feeds_for_drawn(read, drawn) if drawn else None,
        compute=compute,
        draft=None if callable(run) else partial(continue_greedily, run),
        gaps=callable(run) or run.reads_gaps,
    )
    if quantised is not None:
        quantised = quantised.with_rounded_activations(base, judged, compute)
    progress(0.7, f"running {name}")
    pooling, subjects, run = _with_embeddings(read, base, options.given, subjects, batches, run)
    evidence = Evidence(read, base, judged, batches, subjects, run, compute, seed)
    checks = (
        *_about_adapters(read, adapters, base, seed),
        *pooling,
        *([] if exact is None else _judge(evidence)),
    )
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    verdict = replace(verdict, inputs=rows, checks=checks)
    if quantised is None:
        return verdict
    embed = partial(_with_embeddings, read, base, options.given)
    _, plain, shipped = embed(list(quantised.unquantised), batches, candidate)
    _, rounded, _ = embed(list(quantised.rounded), batches, candidate)
    quantised = replace(quantised, unquantised=plain, rounded=rounded)
    verdict = quantised.extend(verdict, subjects, shipped, texts=options.inputs is not None)
    return judge_price(verdict, options.max_kl)


def _effective_seed(artifact: Artifact, seed: int | None, inputs: Path | None) -> int:
    """The seed, by default 0; refused where inputs are given and no adapter is random."""
    if seed is not None and inputs is not None and not _is_random(artifact):
        raise UsageError("--seed: does nothing with --inputs", remedy="Leave it out.")
    return seed or 0


def _is_random(artifact: Artifact) -> bool:
    """Whether the seed chooses or draws the adapters that are judged."""
    count = len(artifact.list_adapters())
    return count > MOST_ADAPTERS or (not count and artifact.manifest.mode != "folded")


def _recorded_sources(artifact: Artifact) -> list[str]:
    """Where the artifact's base model and adapters were when it was made."""
    adapters = [entry.source for entry in artifact.list_adapters().values()]
    return [*adapters, artifact.manifest.base.source]


def _check_report_place(report: Path | None, inputs: Sequence[Path | str], *, force: bool) -> None:
    """Refuse a report directory that must not be replaced, or that holds an input."""
    if report is not None:
        check_replaceable(report, marker=REPORT_FILE, force=force, inputs=inputs)


def _with_embeddings(
    artifact: Artifact,
    base: BaseModel,
    given: Sequence[str | Path],
    subjects: list[Subject],
    batches: Sequence[Tensors],
    candidate: Candidate,
) -> tuple[list[Check], list[Subject], Candidate]:
    """Let sentence embeddings be judged too, where the artifact and its base model agree on them.

    Returns:
        The check of that, and the subjects and the candidate with embeddings.
    """
    if TASKS[base.task].prediction != "embedding" or not callable(candidate):
        return [], subjects, candidate
    recorded = [Path(entry.source) for entry in artifact.list_adapters().values()]
    directories = list(map(source_of, given)) or [str(d) for d in recorded if d.is_dir()]
    source = sentence_source(base.source, base.task, directories[:MOST_ADAPTERS])
    expected = None if source is None else read_sentence_pipeline(source)
    found = read_sentence_pipeline(artifact.directory)
    check = check_pooling(expected, found)
    if check.passed and expected is not None and found is not None:
        subjects = with_embeddings(subjects, batches, expected)
        candidate = embedding(candidate, found)
    return [check], subjects, candidate


def _judge(evidence: Evidence) -> list[Check]:
    """All cases; what the others allow is what the case `parity` has found."""
    dtype = evidence.artifact.manifest.dtype
    checks = list(judge(evidence.subjects, evidence.batches, evidence.runner, dtype))
    allowed = allowed_errors(checks)
    for cases in _FURTHER_CASES:
        checks += cases(evidence, allowed)
    return checks


def write_report(verdict: ParityReport, directory: Path, *, force: bool = False) -> None:
    """Write `parity.json` and the self-contained `parity.html` into a directory of their own."""
    with staged_directory(directory, marker=REPORT_FILE, force=force) as staged:
        (staged / "parity.html").write_text(to_html(verdict), encoding="utf-8")
        (staged / REPORT_FILE).write_text(verdict.to_json(), encoding="utf-8")


def _adapters(artifact: Artifact, given: Sequence[str | Path], seed: int) -> list[Adapter]:
    """The artifact's adapters, read from where they are now, each proven to be the recorded one.

    If a bank has many: those that are given and some chosen at random.
    """
    entries = artifact.list_adapters()
    if len(entries) == 1 and len(given) == 1 and "=" not in str(given[0]):
        given = [f"{next(iter(entries))}={given[0]}"]
    by_name = {adapter.name: adapter for adapter in read_adapters(given)}
    if unknown := by_name.keys() - entries.keys():
        raise unknown_adapters(artifact.directory, sorted(unknown), sorted(entries))
    adapters = []
    for name in _sample(list(entries), by_name, seed):
        entry = entries[name]
        if name not in by_name and not Path(entry.source).is_dir():
            raise AdapterError(
                f"adapter {name}: is no longer at {entry.source}",
                remedy=f"Give its directory: -a {name}=DIR.",
            )
        adapter = by_name.get(name) or Adapter.read(entry.source, name)
        if adapter.digest != entry.digest:
            raise AdapterError(
                f"adapter {name}: is not the one the artifact was made from ({adapter.digest[:19]}…"
                f", expected {entry.digest[:19]}…)",
                remedy=f"Export again, or give its directory: -a {name}=DIR.",
            )
        adapters.append(adapter)
    return adapters


def _sample(names: Sequence[str], given: Collection[str], seed: int) -> list[str]:
    """All names; if there are more than one verdict judges, the given ones and a random choice."""
    others = [name for name in names if name not in given]
    room = max(0, MOST_ADAPTERS - len(given))
    drawn = {*given, *random.Random(seed).sample(others, min(room, len(others)))}
    return [name for name in names if name in drawn]


def _about_adapters(
    artifact: Artifact, adapters: Sequence[Adapter], base: BaseModel, seed: int
) -> Iterator[Check]:
    """Checks of the adapters: how many are judged if not all, and the names of their classes."""
    entries = artifact.list_adapters()
    if len(adapters) < len(entries):
        yield Check(
            "sample",
            "all",
            True,
            f"{len(adapters)} of {len(entries)} adapters are judged, chosen with seed {seed}; "
            "-a NAME=DIR judges those that it names",
        )
    own, layout = artifact.manifest.base, artifact.manifest.layout
    room = base.room if own.own_head else None
    for adapter in adapters:
        recorded = entries[adapter.name].labels
        expected = labels_in(adapter, layout, own.labels, room)
        if expected is None and recorded is None:
            continue
        same = expected == recorded
        detail = "the artifact names the classes as the adapter does"
        if not same:
            detail = f"the artifact names the classes {recorded}, the adapter {expected}"
        yield Check("labels", adapter.name, same, detail)
