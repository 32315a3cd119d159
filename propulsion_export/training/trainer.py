"""Train an adapter on labelled text with transformers' Trainer."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from propulsion_export.output import check_replaceable, staged_directory
from propulsion_export.quiet import quiet_while_training
from propulsion_export.training.card import model_card, write_loss_curve
from propulsion_export.training.checkpoints import checkpoints, describe_run, is_main_process
from propulsion_export.training.data import (
    Example,
    check_labels_known,
    classes_of,
    hold_out,
    read_examples,
)
from propulsion_export.training.encode import encode
from propulsion_export.training.head import Rows, head_only_accuracy
from propulsion_export.training.loop import (
    PREPARED,
    TRAINED,
    AdapterTrainer,
    Progress,
    Watch,
    batch_per_process,
    mean_cross_entropy,
    training_arguments,
)
from propulsion_export.training.metrics import (
    guesses_and_losses,
    history_of,
    loss_curve,
    scores,
    trainable_parameters,
    versions,
)
from propulsion_export.training.model import Base, add_adapter, load_base, longest_text
from propulsion_export.training.options import TrainOptions


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


@dataclass(frozen=True)
class _Data:
    """Checked examples; `origin` says where those for validation come from."""

    classes: list[str]
    training: list[Example]
    validation: list[Example]
    origin: str


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
    batch_per_process(options)
    examples = _read(Path(data).expanduser(), options)
    report(0.02, f"read {len(examples.training)} training rows")
    with quiet_while_training():
        base = load_base(model, examples.classes, options)
        run = describe_run(base.name, examples.training, examples.validation, options)
        with checkpoints(output, run, resume=options.resume) as (directory, latest):
            session = _Session(base, examples, options, report)
            session.fit(directory, latest)
            metrics = session.metrics()
            if is_main_process():
                session.write(output, metrics)
    report(1.0, f"wrote {output}")
    return TrainResult(output, metrics, tuple(metrics["notes"]))


class _Session:
    """One run: the base model, then the adapter on it, and what there is to report."""

    def __init__(self, base: Base, data: _Data, options: TrainOptions, report: Progress) -> None:
        self.base, self.data, self.options, self.report = base, data, options, report
        self.notes: list[str] = []
        self.started = time.monotonic()
        self.longest = longest = longest_text(base, options)
        collator = transformers.DataCollatorForTokenClassification
        if options.task == "text-classification":
            collator = transformers.DataCollatorWithPadding
        self.rows = Rows(
            encode(data.training, data.classes, base.tokenizer, longest),
            encode(data.validation, data.classes, base.tokenizer, longest),
            collator(base.tokenizer),
        )

    def fit(self, directory: Path, latest: Path | None) -> None:
        """Train, from the checkpoint `latest` if there is one; checkpoints go to `directory`."""
        if self.options.resume and not latest:
            self.notes.append("There was no checkpoint to resume, so the training started afresh.")
        arguments = training_arguments(directory, self.options, len(self.rows.training))
        self.head_accuracy = self._head_only(arguments.device)
        self.report(PREPARED, "loaded" if self.head_accuracy is None else "trained the head alone")
        self.model = add_adapter(self.base, self.data.classes, self.options)
        self.trainer = AdapterTrainer(
            self.model,
            arguments,
            data_collator=self.rows.collate,
            train_dataset=list(self.rows.training),
            eval_dataset=list(self.rows.validation),
            compute_loss_func=mean_cross_entropy,
            compute_metrics=scores,
            preprocess_logits_for_metrics=guesses_and_losses,
            callbacks=self._callbacks(),
        )
        self.trainer.head_learning_rate = self.options.head_learning_rate
        # It would print every entry of the log.
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.train(resume_from_checkpoint=str(latest) if latest else None)

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` says."""
        history = history_of(self.trainer.state.log_history)
        kept = history[-1]
        if self.options.early_stopping:
            kept = max(history, key=lambda entry: entry["validation_accuracy"])
        counts = {"train": len(self.data.training), "validation": len(self.data.validation)}
        options = {name: value for name, value in asdict(self.options).items() if name != "seed"}
        return {
            "task": self.options.task,
            "base_model": self.base.name,
            "labels": self.data.classes,
            "rows": counts,
            "max_length": self.longest,
            "validation_data": self.data.origin,
            "train_loss": kept["train_loss"],
            "validation_loss": kept["validation_loss"],
            "validation_accuracy": kept["validation_accuracy"],
            "kept_epoch": kept["epoch"],
            "head_only_accuracy": self.head_accuracy,
            "epochs": history,
            "trainable_parameters": trainable_parameters(self.model),
            "trained_modules": [*self.base.heads, *self.base.absent],
            "seconds": round(time.monotonic() - self.started, 1),
            "seed": self.options.seed,
            "options": options | {"validation": str(self.options.validation or "") or None},
            "versions": versions(),
            "notes": self.notes,
        }

    def write(self, output: Path, metrics: Mapping[str, Any]) -> None:
        """Write the adapter directory, whole or not at all."""
        self.report(TRAINED, "trained")
        log = self.trainer.state.log_history
        with staged_directory(
            output, marker="adapter_config.json", force=self.options.force
        ) as partial:
            # The frozen embedding is the base model's, whatever has a vector on it.
            self.model.save_pretrained(partial, save_embedding_layers=False)
            text = json.dumps(metrics, indent=2) + "\n"
            (partial / "metrics.json").write_text(text, encoding="utf-8")
            write_loss_curve(partial / "loss-curve.png", loss_curve(log), metrics["epochs"])
            (partial / "README.md").write_text(model_card(metrics), encoding="utf-8")

    def _head_only(self, device: torch.device) -> float | None:
        if not self.options.head_only:
            return None
        if self.base.absent:
            self.notes.append(
                f"The base model's checkpoint has no {', '.join(self.base.absent)}: trained and "
                "saved with the head; the accuracy of the head alone would say nothing."
            )
            return None
        return head_only_accuracy(self.base, self.rows, self.options, device)

    def _callbacks(self) -> list[Any]:
        callbacks: list[Any] = [Watch(self.report)]
        if self.options.early_stopping:
            callbacks.append(transformers.EarlyStoppingCallback(self.options.early_stopping))
        return callbacks


def _silent(fraction: float, message: str) -> None:
    pass


def _read(source: Path, options: TrainOptions) -> _Data:
    examples = read_examples(source, options.columns)
    classes = classes_of(source, examples)
    if options.validation is None:
        training, validation = hold_out(source, examples, options.seed)
        part = "each class" if options.task == "text-classification" else "the rows"
        origin = f"a tenth of {part} of {source.name}, held out with seed {options.seed}"
        return _Data(classes, training, validation, origin)
    file = Path(options.validation).expanduser()
    validation = read_examples(file, options.columns)
    check_labels_known(file, validation, classes)
    return _Data(classes, examples, validation, file.name)
