"""transformers' Trainer, set up for an adapter: rates, checkpoints, reports."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from propulsion_export.artifacts.disk_errors import disk_errors_in_words
from propulsion_export.environment.progress import Progress
from propulsion_export.errors import UsageError
from propulsion_export.training.checkpoint_digests import check_best
from propulsion_export.training.metrics import history_of, kind_of
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.processes import Processes, check_joined

PREPARED = 0.1  # the share of the work before the adapter's training starts
TRAINED = 0.98  # the share when it ends
_CURVE_POINTS = 20  # training losses per epoch in the picture
_MUST_BE_FINITE = {
    "loss": "loss",
    "eval_perplexity": "validation perplexity",
    "eval_mean_loss": "validation loss",
}


def micro_batch(options: TrainOptions, processes: int) -> int:
    """How many examples each of so many processes takes at a time.

    Raises:
        UsageError: the processes and the accumulated steps cannot share a batch evenly.
    """
    steps = options.gradient_accumulation_steps
    if options.batch_size % (processes * steps):
        shares = f"{processes} processes that share a batch"
        if steps > 1:
            shares = f"{processes} processes x {steps} accumulated steps that share a batch"
        raise UsageError(
            f"--batch-size is {options.batch_size}, expected a multiple of the {shares}"
        )
    return options.batch_size // (processes * steps)


def training_arguments(
    directory: Path, options: TrainOptions, rows: int, processes: Processes
) -> Any:
    """The Trainer's settings; it writes a checkpoint to `directory` after each epoch.

    Raises:
        UsageError: see `micro_batch`.
        UnavailableError: processes that were launched together do not find each other.
    """
    steps = math.ceil(rows / options.batch_size)
    share = micro_batch(options, processes.count)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        per_device_eval_batch_size=share,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        seed=options.seed,
        logging_steps=max(1, steps // _CURVE_POINTS),
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=None,  # `DigestEach` removes older ones
        activation_checkpointing=options.gradient_checkpointing,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        # Without this, processes on a machine that has only CPUs would not find each other.
        use_cpu=not torch.accelerator.is_available(),
        **(_early_stopping(options) if options.early_stopping else {}),
    )
    check_joined(arguments, processes)
    # One process uses one GPU: DataParallel would multiply the batch by the number of GPUs.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _early_stopping(options: TrainOptions) -> dict[str, Any]:
    measure = options.training.best_by
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": measure,
        "greater_is_better": measure == "accuracy",
        "restore_callback_states_from_checkpoint": True,
    }


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
            # A checkpoint of FSDP cannot hold two groups without parameters.
            used = [group for group in groups if group["params"]]
            self.optimizer = torch.optim.AdamW(used, weight_decay=0.0)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The Trainer's method would copy the frozen embedding into each, and pickle the arguments.
        if self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            directory = output_dir or self.args.output_dir
            self.model.save_pretrained(directory, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        remedy = "Make room there, then continue with --resume."
        with disk_errors_in_words(Path(self.args.output_dir), remedy=remedy):
            super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        # The Trainer's method goes on with the last epoch's weights if the file is not there.
        check_best(Path(self.state.best_model_checkpoint))
        super()._load_best_model()


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports steps and epochs, and stops the training when the loss is not finite."""

    def __init__(self, options: TrainOptions, report: Progress) -> None:
        self.options, self.report = options, report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state, f"step {state.global_step} of {state.max_steps}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = True  # so that no mean of losses spans two epochs

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any
    ) -> None:
        for name, what in _MUST_BE_FINITE.items():
            if not math.isfinite(logs.get(name, 0.0)):
                raise UsageError(
                    f"the training diverged: the {what} is {logs[name]} at step "
                    f"{state.global_step}",
                    remedy="Choose a lower --learning-rate"
                    + ("." if self.options.task_entry.generates else " or --head-learning-rate."),
                )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = history_of(state.log_history)[-1]
        measure = f"validation {self.options.training.measure}"
        value = last[measure.replace(" ", "_")]
        self._report(
            state, f"epoch {last['epoch']} of {args.num_train_epochs}: {measure} {value:.4f}"
        )

    def _report(self, state: Any, message: str) -> None:
        share = state.global_step / state.max_steps
        self.report(PREPARED + share * (TRAINED - PREPARED), message)
