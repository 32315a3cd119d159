"""`train`: an adapter from a base model and a data file, by transformers' Trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.staging import check_replaceable
from propulsion_export.base_model.tasks import Architecture, Prediction
from propulsion_export.environment.paths import user_path
from propulsion_export.environment.progress import Progress, silent
from propulsion_export.environment.quiet import quiet_while_training
from propulsion_export.training.checkpoints import checkpoints, describe_run
from propulsion_export.training.classifying import ClassifierRun
from propulsion_export.training.generating import DecoderRun, EncoderDecoderRun
from propulsion_export.training.loop import micro_batch
from propulsion_export.training.model import load_trainable
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.processes import Processes, joined, started_processes
from propulsion_export.training.run import TrainingRun

_RUNS: dict[tuple[Prediction, Architecture], type[TrainingRun[Any]]] = {
    ("class", "encoder"): ClassifierRun,
    ("word classes", "encoder"): ClassifierRun,
    ("text", "decoder"): DecoderRun,
    ("text", "encoder-decoder"): EncoderDecoderRun,
}


@dataclass(frozen=True)
class TrainResult:
    """A trained adapter.

    Attributes:
        directory: the adapter as PEFT saves it, with `metrics.json`, `loss-curve.png` and a model
            card.
        metrics: the content of `metrics.json`.
        notes: what else the caller should know, such as cut texts; one sentence each.
    """

    directory: Path
    metrics: Mapping[str, Any]
    notes: tuple[str, ...]


def train(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    options: TrainOptions | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train an adapter for `model` on the rows of `data` and write it to the directory `output`.

    The data are checked before the model is loaded. One seed gives the same adapter, bit for bit,
    on one machine's CPU. Under `accelerate launch` or `torchrun` every process calls this and the
    first one writes. An interrupted run leaves its last two finished epochs for `resume`
    in a hidden directory `.NAME.checkpoints` beside the output. `progress` may raise to interrupt
    the run.

    Raises:
        UsageError: the options do not fit, the output may not be replaced, the checkpoint to
            resume belongs to another run, the training diverged, or the environment's variables
            for several processes contradict each other.
        UnavailableError: processes that were launched together do not find each other.
        DataError: the data cannot be used; nothing was written.
        BaseModelError: the base model cannot be used, or is not the one that the run to resume
            began with.
        AdapterError: every checkpoint to resume is damaged, or the best epoch's is.
    """
    options = options or TrainOptions()
    processes = started_processes()
    report = progress if progress and processes.is_main else silent
    output = user_path(output).resolve()
    check_replaceable(
        output,
        marker="adapter_config.json",
        force=options.force,
        inputs=[path for path in (model, data, options.validation) if path],
    )
    micro_batch(options, processes.count)
    with joined(processes):
        metrics = _train(model, user_path(data), output, options, processes, report)
    report(1.0, f"wrote {output}")
    return TrainResult(output, metrics, tuple(metrics["notes"]))


def _train(
    model: str | Path,
    data: Path,
    output: Path,
    options: TrainOptions,
    processes: Processes,
    report: Progress,
) -> dict[str, Any]:
    """Train and, in the main process, write the adapter; returns the content of `metrics.json`."""
    task = options.task_entry
    run_class = _RUNS[task.prediction, task.architecture]
    read = run_class.read(data, options)
    report(0.02, f"read {len(read.training)} training rows")
    with quiet_while_training():
        base = load_trainable(model, read.classes, options)
        description = describe_run(base, read.training, read.validation, options)
        kept = checkpoints(output, description, resume=options.resume, is_main=processes.is_main)
        with kept as saved:
            run = run_class(base, read, options, report)
            run.fit(saved, processes)
            metrics = run.metrics()
            if processes.is_main:
                run.write(output, metrics)
    return metrics
