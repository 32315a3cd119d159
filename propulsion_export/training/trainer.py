"""Train an adapter on a data file with transformers' Trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.staging import check_replaceable
from propulsion_export.base_model.tasks import Architecture, Prediction
from propulsion_export.environment.quiet import quiet_while_training
from propulsion_export.training.checkpoints import checkpoints, describe_run, is_main_process
from propulsion_export.training.classifying import ClassifierRun
from propulsion_export.training.generating import DecoderRun, EncoderDecoderRun
from propulsion_export.training.loop import Progress, micro_batch
from propulsion_export.training.model import load_trainable
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.run import TrainingRun

_RUNS: dict[tuple[Prediction, Architecture], type[TrainingRun[Any]]] = {
    ("class", "encoder"): ClassifierRun,
    ("word classes", "encoder"): ClassifierRun,
    ("text", "decoder"): DecoderRun,
    ("text", "encoder-decoder"): EncoderDecoderRun,
}


@dataclass(frozen=True)
class TrainResult:
    """An adapter that was trained.

    Attributes:
        directory: holds the adapter, as PEFT saves it, with `metrics.json`, `loss-curve.png` and
            a model card.
        metrics: what `metrics.json` says.
        notes: what the caller should know and did not ask for, one sentence each.
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
    first one writes. When it is interrupted, a hidden directory `.NAME.checkpoints` beside the
    output keeps the last finished epoch for `resume`. `progress` may raise to interrupt.

    Raises:
        UsageError: the options do not fit, the output may not be replaced, the checkpoint to
            resume is of another run, or the training diverged.
        UnavailableError: processes that were launched together do not find each other.
        DataError: the data cannot be used; nothing was written.
        BaseModelError: the base model cannot be used.
    """
    options = options or TrainOptions()
    report = progress if progress and is_main_process() else _silent
    output = Path(output).expanduser().resolve()
    check_replaceable(
        output,
        marker="adapter_config.json",
        force=options.force,
        inputs=[path for path in (model, data, options.validation) if path],
    )
    micro_batch(options)
    task = options.task_entry
    of_task = _RUNS[task.prediction, task.architecture]
    read = of_task.read(Path(data).expanduser(), options)
    report(0.02, f"read {len(read.training)} training rows")
    with quiet_while_training():
        base = load_trainable(model, read.classes, options)
        run = describe_run(base.name, read.training, read.validation, options)
        with checkpoints(output, run, resume=options.resume) as (directory, latest):
            session = of_task(base, read, options, report)
            session.fit(directory, latest)
            metrics = session.metrics()
            if is_main_process():
                session.write(output, metrics)
    report(1.0, f"wrote {output}")
    return TrainResult(output, metrics, tuple(metrics["notes"]))


def _silent(fraction: float, message: str) -> None:
    pass
