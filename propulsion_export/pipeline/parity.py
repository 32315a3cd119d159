"""`parity`: does an artifact compute what the PyTorch base model with its adapters computes?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.sentence_source import sentence_source
from propulsion_export.adapters.specification import source_of
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.staging import check_replaceable, staged_directory
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.machine import tool_versions
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.errors import UnavailableError, UsageError
from propulsion_export.graph.signature import check_signature
from propulsion_export.parity.bisect.locate import locate_failures
from propulsion_export.parity.cases import judge
from propulsion_export.parity.devices import check_device, choose_compute
from propulsion_export.parity.diagnosis import judge_own_error, judge_padding_effect
from propulsion_export.parity.drawn import draw_adapters, feeds_for_drawn
from propulsion_export.parity.embeddings import check_pooling, embedding, with_embeddings
from propulsion_export.parity.evidence import Evidence, FurtherCases, allowed_errors
from propulsion_export.parity.extremes import extreme_probe
from propulsion_export.parity.failing import FailingRun, worst_failing_run
from propulsion_export.parity.generation import continue_greedily, judge_generative
from propulsion_export.parity.inputs import load_recorded_base, make_batches
from propulsion_export.parity.matrix.against import (
    Other,
    judge_against,
    read_other,
    references_at,
)
from propulsion_export.parity.matrix.judging import judge_matrix
from propulsion_export.parity.mixing import judge_mixed
from propulsion_export.parity.oracle import GREEDY_STEPS, compute_oracle
from propulsion_export.parity.own_error import ceiling_of
from propulsion_export.parity.probes import (
    Effort,
    Limits,
    coverage_of_batches,
    make_probes,
    read_in_one_step,
)
from propulsion_export.parity.probing import judge_inputs, split
from propulsion_export.parity.quantised.verdict import (
    check_price_option,
    exact_candidate,
    judge_price,
    quantise_base_,
)
from propulsion_export.parity.reports.html import to_html
from propulsion_export.parity.reports.report import Check, NotRun, ParityReport
from propulsion_export.parity.reports.reproduce import write_failing_run
from propulsion_export.parity.settings import check_settings
from propulsion_export.parity.states import states_of
from propulsion_export.parity.subject import Subject
from propulsion_export.parity.tables import compare_tables
from propulsion_export.parity.texts import compare_texts
from propulsion_export.parity.user_rows import user_probes
from propulsion_export.pipeline.judged_adapters import (
    MOST_ADAPTERS,
    checks_of_adapters,
    effective_seed,
    is_random,
    judged_adapters,
)
from propulsion_export.runners.decoding import Candidate
from propulsion_export.runners.opening import (
    REFERENCE_LENGTH,
    REFERENCE_LONGEST_ROW,
    choose_runner,
    open_candidate,
)

_FURTHER_CASES: tuple[FurtherCases, ...] = (
    judge_inputs,
    judge_generative,
    judge_mixed,
    judge_matrix,
)
REPORT_FILE: Literal["parity.json"] = "parity.json"


def check_parity(
    artifact: Path,
    *,
    model: str | None = None,
    adapter: Sequence[str | Path] = (),
    against: Sequence[Path] = (),
    runner: str = "auto",
    inputs: Path | None = None,
    seed: int | None = None,
    report: Path | None = None,
    force: bool = False,
    device: str = "auto",
    low_memory: bool = False,
    max_kl: float | None = None,
    effort: Effort = "standard",
    bisect: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an artifact with PyTorch and return the verdict; `report.passed` is the answer.

    Args:
        artifact: directory of a merged checkpoint, an ONNX export or an engine.
        model: where the base model is now; default: where it was when the artifact was made.
        adapter: where adapters are now, `NAME=DIR`; default: where they were. If a bank has more
            than 16, these are judged and others chosen at random.
        against: directories of other artifacts of the same base model, to be compared with for
            every adapter that they have too.
        runner: the runtime; `auto`: the default for its kind and dtype.
        inputs: file of texts to compare on, one per line (.txt) or JSONL with `text`; default:
            random tokens.
        seed: for random tokens, the choice of adapters, and the random adapter that stands in
            where the artifact has slots and no adapter; default: 0.
        report: directory to write `parity.json` and `parity.html` to.
        force: replace an earlier report.
        device: where PyTorch computes: `cpu`, `cuda`, or `auto`, a GPU with room for the model if
            there is one.
        low_memory: let PyTorch compute with one layer of the model in memory at a time.
        max_kl: the most that quantised weights may cost an adapter or the base model, in nats: the
            mean Kullback-Leibler divergence from the unquantised model. Default: any, only told.
        effort: how many inputs to compare on; `quick`: 16 random rows; `standard`: also what finds
            mistakes at the ends of tables, masks and batches, within a budget; `thorough`: all of
            it, whatever the time. What was left out is in `report.coverage`.
        bisect: find the first module that is wrong where a comparison has failed; see `located` of
            the report.
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
    given = (artifact, model, inputs, *against, *map(source_of, adapter))
    _check_report_place(report, [path for path in given if path], force=force)
    read = Artifact.read(artifact)
    given_alone = inputs is not None and effort == "quick"  # nothing else is compared
    seed = effective_seed(read, seed, given_alone=given_alone)
    if report is not None:
        _check_report_place(report, _recorded_sources(read), force=force)
    check_signature(read)
    check_price_option(read, max_kl)
    others = [read_other(read, directory) for directory in against]
    name = choose_runner(read, runner)
    check_device(device)
    if bisect and low_memory:
        raise UsageError(
            "--bisect: needs the whole model in memory, in float64 too",
            remedy="Leave --low-memory out.",
        )
    adapters = judged_adapters(read, adapter, seed)
    verdict = ParityReport(
        artifact=str(artifact),
        kind=read.manifest.kind,
        dtype=read.manifest.dtype,
        runner=name,
        inputs=0,
        seed=None if given_alone and not is_random(read) else seed,
        tools=tool_versions(),
    )
    worst: list[FailingRun] = []
    keep = None if report is None else worst.append
    options = _Options(
        adapter,
        others,
        model,
        inputs,
        seed,
        device,
        low_memory,
        max_kl,
        effort,
        bisect,
        keep,
        trust_remote_code,
    )
    try:
        verdict = _compare(read, verdict, adapters, options, progress)
    except UnavailableError as error:
        verdict = replace(verdict, not_run=(NotRun(f"{name} on {artifact}", str(error)),))
    if report is not None:
        write_report(verdict, report, force=force, artifact=read, worst=next(iter(worst), None))
    progress(1.0, verdict.verdict)
    return verdict


@dataclass(frozen=True)
class _Options:
    """What to compare with and how; the arguments of `check_parity` of these names.

    Attributes:
        given: the adapters.
        others: the artifacts to compare with.
        keep: called with the worst run of a failure; None: nothing is kept.
    """

    given: Sequence[str | Path]
    others: Sequence[Other]
    model: str | None
    inputs: Path | None
    seed: int
    device: str
    low_memory: bool
    max_kl: float | None
    effort: Effort
    bisect: bool
    keep: Callable[[FailingRun], None] | None
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
    in_python = (REFERENCE_LENGTH, REFERENCE_LONGEST_ROW) if name == "reference" else ()
    gaps = callable(run) or run.reads_gaps
    limits = Limits.of(read.manifest, *in_python, empty=gaps)
    probes, coverage = make_probes(base, seed, options.effort, limits)
    compute = choose_compute(base, options.device, low_memory=options.low_memory)
    quantised = quantise_base_(read, base, judged, batches, compute)
    feeds = feeds_for_drawn(read, drawn) if drawn else None
    states = states_of(read, base, judged, feeds or {})
    extremes, looked_at = extreme_probe(base, states, compute, seed, options.effort, limits)
    users, told_of_users = user_probes(base, states, compute, seed, options.effort, limits)
    probes += [*users, *extremes]
    every = [*batches, *(probe.batch for probe in probes)]
    at_others = references_at(options.others, read, base, judged, every, compute)
    tables = compare_tables(read, base, judged)
    places = {adapter.name: Path(adapter.source) for adapter in adapters}
    texts = compare_texts(read, base, adapters, places, trust_remote_code=trust)
    settings, told = check_settings(read, base, places)
    subjects = compute_oracle(
        read,
        base,
        judged,
        every,
        progress,
        steps=REFERENCE_LENGTH if name == "reference" else GREEDY_STEPS,
        feeds=feeds,
        compute=compute,
        draft=None if callable(run) else partial(continue_greedily, run),
        gaps=gaps,
        in_one_step=read_in_one_step(batches, probes),
    )
    if quantised is not None:
        quantised = quantised.with_rounded_activations(base, judged, compute)
    progress(0.7, f"running {name}")
    pooling, subjects, run = _with_embeddings(read, base, options.given, subjects, every, run)
    subjects, probed = split(subjects, len(batches))
    evidence = Evidence(read, base, judged, batches, subjects, run, compute, seed, probes, probed)
    checks = (
        *checks_of_adapters(read, adapters, base, seed),
        *pooling,
        *([] if exact is None else _judge(evidence)),
        *tables.checks,
        *texts.checks,
        *settings,
    )
    embed = partial(_with_embeddings, read, base, options.given)
    at_others = {dtype: embed(found, every, run)[1] for dtype, found in at_others.items()}
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    covered = (
        *(*coverage_of_batches(batches), *coverage, *told_of_users, *looked_at),
        *(*tables.coverage, *texts.coverage, *told),
    )
    verdict = replace(verdict, inputs=rows, checks=checks, coverage=covered)
    verdict = _compare_with_others(verdict, evidence, at_others, options)
    if options.keep is not None and exact is not None and not verdict.passed:
        worst = worst_failing_run(evidence, checks, allowed_errors(checks))
        if worst is not None:
            options.keep(worst)
    if options.bisect and exact is not None and not verdict.passed:
        progress(0.9, "looking for the first wrong module")
        verdict = _with_located(evidence, verdict, options)
    if quantised is None:
        return verdict
    _, plain, shipped = embed(list(quantised.unquantised), batches, candidate)
    _, rounded, _ = embed(list(quantised.rounded), batches, candidate)
    quantised = replace(quantised, unquantised=plain, rounded=rounded)
    verdict = quantised.extend(verdict, subjects, shipped, texts=options.inputs is not None)
    return judge_price(verdict, options.max_kl)


def _compare_with_others(
    verdict: ParityReport,
    evidence: Evidence,
    references: Mapping[str, Sequence[Subject]],
    options: _Options,
) -> ParityReport:
    """The verdict with the case `against` for every other artifact."""
    allowed, trust = allowed_errors(verdict.checks), options.trust_remote_code
    found = [
        result
        for other in options.others
        for result in judge_against(evidence, allowed, other, references, trust_remote_code=trust)
    ]
    checks = [one for one in found if isinstance(one, Check)]
    not_run = [one for one in found if isinstance(one, NotRun)]
    return replace(
        verdict,
        checks=(*verdict.checks, *checks),
        not_run=(*verdict.not_run, *not_run),
    )


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
    ceiling = ceiling_of(evidence.base.model.config, dtype)
    checks = list(judge(evidence.subjects, evidence.batches, evidence.runner, dtype, ceiling))
    checks += [*judge_own_error(evidence, checks), *judge_padding_effect(evidence)]
    allowed = allowed_errors(checks)
    for cases in _FURTHER_CASES:
        checks += cases(evidence, allowed)
    return checks


def _with_located(evidence: Evidence, verdict: ParityReport, options: _Options) -> ParityReport:
    """The report with the first wrong module of each failure."""
    artifact, base = evidence.artifact, evidence.base
    if artifact.manifest.dtype != "float32" and artifact.manifest.quantization is None:
        # The weights of the base model have been rounded to the artifact's precision by now.
        trust = options.trust_remote_code
        base = load_recorded_base(
            artifact, evidence.adapters, options.model, trust_remote_code=trust
        )
    located, not_run = locate_failures(evidence, verdict.checks, verdict.runner, base)
    return replace(verdict, located=located, not_run=(*verdict.not_run, *not_run))


def write_report(
    verdict: ParityReport,
    directory: Path,
    *,
    force: bool = False,
    artifact: Artifact | None = None,
    worst: FailingRun | None = None,
) -> None:
    """Write `parity.json` and the self-contained `parity.html` into a directory of their own.

    With the worst run of a failure of `artifact`, also `failing/`: its arrays and `reproduce.py`.
    """
    with staged_directory(directory, marker=REPORT_FILE, force=force) as staged:
        (staged / "parity.html").write_text(to_html(verdict), encoding="utf-8")
        (staged / REPORT_FILE).write_text(verdict.to_json(), encoding="utf-8")
        if worst is not None and artifact is not None:
            write_failing_run(worst, artifact, verdict.runner, staged, final=directory)
