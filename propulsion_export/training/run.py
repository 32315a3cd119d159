"""A training run: the steps that all tasks share."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch
import transformers

from propulsion_export.artifacts.staging import staged_directory
from propulsion_export.data.rows import Item
from propulsion_export.environment.json_text import to_json
from propulsion_export.environment.progress import Progress
from propulsion_export.training.card import model_card, write_loss_curve
from propulsion_export.training.checkpoint_digests import DigestEach
from propulsion_export.training.checkpoints import Checkpoints
from propulsion_export.training.encode import Rows
from propulsion_export.training.loop import (
    PREPARED,
    TRAINED,
    AdapterTrainer,
    Watch,
    training_arguments,
)
from propulsion_export.training.metrics import (
    best_epoch,
    history_of,
    loss_curve,
    trainable_parameters,
    versions,
)
from propulsion_export.training.model import TrainableBase, attach_adapter, longest_text
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.processes import Processes


@dataclass(frozen=True)
class Data(Generic[Item]):
    """Checked training and validation data; `origin` says where the validation data come from."""

    training: list[Item]
    validation: list[Item]
    origin: str
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what is measured.

    Attributes:
        loss: from a model's outputs and `labels`, the loss of a batch.
        outcomes: from logits and labels, the outcome of each label; small enough to be gathered
            from all processes.
        scores: from all outcomes, `mean_loss` and the task's measure.
    """

    loss: Callable[..., torch.Tensor]
    outcomes: Callable[..., Any]
    scores: Callable[[Any], dict[str, float]]


def _notes_on(base: TrainableBase) -> list[str]:
    padding = base.settings.model.get("pad_token_id")
    if padding is None:
        return []
    return [
        f"Rows are padded with token {padding}, which config.json does not name as pad_token_id; "
        "the adapter records it."
    ]


class TrainingRun(ABC, Generic[Item]):
    """One run: encodes the data, trains the adapter, writes it with its metrics.

    A subclass for each kind of task reads and encodes the data, names the objective, and measures
    what the adapter is compared with.
    """

    def __init__(
        self, base: TrainableBase, data: Data[Item], options: TrainOptions, report: Progress
    ) -> None:
        self.base, self.data, self.options, self.report = base, data, options, report
        self.notes = _notes_on(base)
        self.started = time.monotonic()
        self.longest = longest_text(base, options)
        self.rows = self.encoded()

    objective: ClassVar[Objective]

    @staticmethod
    @abstractmethod
    def read(source: Path, options: TrainOptions) -> Data[Any]:
        """Read the data to train on and to validate on.

        Raises:
            DataError: the data cannot be used.
        """

    @abstractmethod
    def encoded(self) -> Rows:
        """The data as the model's inputs, no text longer than `longest` tokens."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The entries of `metrics.json` that only this task has."""

    def write_beside(self, directory: Path) -> None:
        """Write what else an artifact of the adapter needs into the adapter's directory."""

    def before_adapter(self, device: torch.device) -> str:
        """Measure the base model for the comparison; returns a progress message."""
        return "loaded"

    def after_training(self) -> None:
        """Measure the base model for the comparison, with `trainer`."""

    def fit(self, saved: Checkpoints, processes: Processes) -> None:
        """Train, from the latest checkpoint if there is one, and write new ones beside it."""
        afresh = "There was no checkpoint to resume, so the training started afresh."
        missing = self.options.resume and not saved.latest
        self.notes += filter(None, (afresh if missing else saved.note, processes.note))
        arguments = training_arguments(
            saved.directory, self.options, len(self.rows.training), processes
        )
        self.report(PREPARED, self.before_adapter(arguments.device))
        self.model = attach_adapter(self.base, self.data.classes, self.options)
        self.trained = trainable_parameters(self.model)
        self.trainer = AdapterTrainer(
            self.model,
            arguments,
            data_collator=self.rows.collate,
            train_dataset=list(self.rows.training),
            eval_dataset=list(self.rows.validation),
            compute_loss_func=self.objective.loss,
            compute_metrics=self.objective.scores,
            preprocess_logits_for_metrics=self.objective.outcomes,
            callbacks=self._callbacks(),
        )
        self.trainer.head_learning_rate = self.options.head_learning_rate
        # PrinterCallback would print every entry of the log.
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.train(resume_from_checkpoint=str(saved.latest) if saved.latest else None)
        self.after_training()
        self.gathered = self._gathered()

    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        history = history_of(self.trainer.state.log_history)
        training, kept = self.options.training, history[-1]
        if self.options.early_stopping:
            kept = best_epoch(history, training)
        measure = f"validation_{training.measure}"
        return {
            "task": self.options.task,
            "base_model": self.base.name,
            "rows": {"train": len(self.data.training), "validation": len(self.data.validation)},
            "max_length": self.longest,
            "validation_data": self.data.origin,
            **{name: kept[name] for name in ("train_loss", "validation_loss", measure)},
            "kept_epoch": kept["epoch"],
            **self.described(),
            "epochs": history,
            "trainable_parameters": self.trained,
            "trained_modules": [*self.base.heads, *self.base.absent],
            "seconds": round(time.monotonic() - self.started, 1),
            "seed": self.options.seed,
            "options": self._options(),
            "versions": versions(),
            "notes": self.notes,
        }

    def write(self, output: Path, metrics: Mapping[str, Any]) -> None:
        """Write the adapter directory, whole or not at all."""
        self.report(TRAINED, "trained")
        losses = loss_curve(self.trainer.state.log_history)
        with staged_directory(
            output, marker="adapter_config.json", force=self.options.force
        ) as partial:
            # The frozen embedding belongs to the base model, even if the adapter scales it.
            self.model.save_pretrained(
                partial, save_embedding_layers=False, state_dict=self.gathered
            )
            self.write_beside(partial)
            text = to_json(metrics, non_finite=str, indent=2) + "\n"
            (partial / "metrics.json").write_text(text, encoding="utf-8")
            write_loss_curve(partial / "loss-curve.png", losses, metrics)
            card = model_card(metrics)  # a path in it may be no UTF-8
            (partial / "README.md").write_text(card, encoding="utf-8", errors="replace")

    def _gathered(self) -> dict[str, torch.Tensor] | None:
        """The whole state if FSDP splits it over the processes, all of which must call this."""
        if not self.trainer.is_fsdp_enabled:
            return None
        gathered: dict[str, torch.Tensor] = self.trainer.accelerator.get_state_dict(
            self.trainer.model
        )
        return gathered

    def _options(self) -> dict[str, Any]:
        """The options without the seed, as JSON values."""
        options = {name: value for name, value in asdict(self.options).items() if name != "seed"}
        return options | {
            **{name: str(options[name] or "") or None for name in ("validation", "chat_template")},
            "max_length": self.options.max_length or self.options.training.max_length,
        }

    def _callbacks(self) -> list[Any]:
        callbacks: list[Any] = [DigestEach(), Watch(self.options, self.report)]
        if self.options.early_stopping:
            callbacks.append(transformers.EarlyStoppingCallback(self.options.early_stopping))
        return callbacks
