"""transformers' Trainer, set up for an adapter: rates, checkpoints, reports."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from propulsion_export.errors import UnavailableError, UsageError
from propulsion_export.training.encode import IGNORED
from propulsion_export.training.metrics import history_of, kind_of
from propulsion_export.training.options import TrainOptions

# Called with the share that is done, 0 to 1, and what was just done.
Progress = Callable[[float, str], None]

PREPARED = 0.1  # the share of the work before the adapter's training starts
TRAINED = 0.98
_CURVE_POINTS = 20  # training losses in the picture, an epoch


def mean_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss over what has a class, as a mean over the batch of all processes.

    A model's own loss is a mean over one process's share, which the Trainer then takes for a share
    of the whole mean and multiplies by the number of processes (transformers 5.24).

    Args:
        outputs: with `logits` of shape [..., classes].
        labels: class numbers, shape [...]; negative ones are not counted.
        num_items_in_batch: how many are counted in all processes together.
    """
    logits = outputs.logits.float().flatten(0, -2)
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    total = functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    return total / count


def batch_per_process(options: TrainOptions) -> int:
    """How many examples each process takes of a batch.

    Raises:
        UsageError: the processes cannot share a batch evenly.
    """
    processes = _processes()
    if options.batch_size % processes:
        raise UsageError(
            f"--batch-size is {options.batch_size}, expected a multiple of the {processes} "
            "processes that share a batch"
        )
    return options.batch_size // processes


def training_arguments(directory: Path, options: TrainOptions, rows: int) -> Any:
    """The Trainer's settings; checkpoints go to `directory`, once an epoch."""
    steps = math.ceil(rows / options.batch_size)
    stops = options.early_stopping is not None
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=batch_per_process(options),
        per_device_eval_batch_size=batch_per_process(options),
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        seed=options.seed,
        logging_steps=max(1, steps // _CURVE_POINTS),
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=stops,
        metric_for_best_model="accuracy" if stops else None,
        restore_callback_states_from_checkpoint=stops,
        activation_checkpointing=options.gradient_checkpointing,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        # Without this, processes on a machine that has only CPUs would not find each other.
        use_cpu=not torch.accelerator.is_available(),
    )
    if arguments.world_size != _processes():
        raise UnavailableError(
            f"distributed training: {_processes()} processes were started, {arguments.world_size} "
            "found each other"
        )
    # One process uses one GPU: DataParallel would multiply the batch by the number of GPUs.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class AdapterTrainer(transformers.Trainer):  # type: ignore[misc]
    """A Trainer with a learning rate of its own for the head, and small checkpoints."""

    head_learning_rate: float
    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without weight decay, which would pull the vectors to 0 and not to 1."""
        if self.optimizer is None:
            trained: dict[str, list[Any]] = {"vectors": [], "biases": [], "head": []}
            for name, parameter in (self.model if model is None else model).named_parameters():
                if parameter.requires_grad:
                    trained[kind_of(name)].append(parameter)
            rate = self.args.learning_rate
            groups = [
                {"params": trained["vectors"], "lr": rate},
                {"params": trained["biases"], "lr": rate},
                {"params": trained["head"], "lr": self.head_learning_rate},
            ]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The Trainer's own would copy the frozen embedding into each, and pickle the arguments.
        if self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            directory = output_dir or self.args.output_dir
            self.model.save_pretrained(directory, save_embedding_layers=False)


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Report steps and epochs, and stop when the loss is no number."""

    def __init__(self, report: Progress) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state, f"step {state.global_step} of {state.max_steps}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = True  # so that no mean of losses spans two epochs

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any
    ) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UsageError(
                f"the training diverged: the loss is {logs['loss']} at step {state.global_step}",
                remedy="Choose a lower --learning-rate or --head-learning-rate.",
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = history_of(state.log_history)[-1]
        self._report(
            state,
            f"epoch {last['epoch']} of {args.num_train_epochs}: "
            f"validation accuracy {last['validation_accuracy']:.4f}",
        )

    def _report(self, state: Any, message: str) -> None:
        share = state.global_step / state.max_steps
        self.report(PREPARED + share * (TRAINED - PREPARED), message)
