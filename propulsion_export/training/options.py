"""What a training run is asked to do; the names are those of the command's long options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from propulsion_export.errors import UsageError
from propulsion_export.training.data import COLUMNS, Columns, Task


@dataclass(frozen=True)
class TrainOptions:
    """How to train an adapter.

    The defaults were the best of the settings tried on the samples' WordNet topics.

    Attributes:
        task: `text-classification` or `token-classification`.
        text_column: holds the inputs; by default `text`, or `tokens` (a list of words).
        label_column: holds the labels; by default `label`, or `labels` (one per word).
        validation: file to validate on after each epoch; by default a tenth of the data is held
            out.
        placement: `attention`, `all`, or a regular expression for module paths.
        degree: the power that the trained vectors are raised to.
        train_bias: train the biases of the wrapped layers too.
        epochs: passes over the training data.
        batch_size: examples per optimiser step, over all processes together.
        learning_rate: of the vectors and biases; falls linearly to 0.
        head_learning_rate: of the task head; falls linearly to 0.
        max_length: texts are cut to so many tokens, fewer if the base model takes fewer.
        seed: fixes the held-out rows, the head's first values, the order of rows and the dropout.
        early_stopping: stop after so many epochs without a better validation accuracy, and keep
            the best epoch; by default all epochs run and the last is kept.
        gradient_checkpointing: compute activations again in the backward pass to save memory.
        dtype: of the frozen base model; vectors, biases and head are trained in float32.
        trust_remote_code: run code that the model directory brings along.
        head_only: also train the task head alone, to tell what the adapter adds.
        resume: go on from the checkpoint that an interrupted run of the same options left.
        force: replace an adapter that stands at the output.
    """

    task: Task = "text-classification"
    text_column: str | None = None
    label_column: str | None = None
    validation: Path | None = None
    placement: str = "all"
    degree: float = 15
    train_bias: bool = False
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-2
    max_length: int = 128
    seed: int = 0
    early_stopping: int | None = None
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    head_only: bool = True
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"{_option(name)} is {value!r}, expected {expected}"
            for name, value, expected, right in (
                ("task", self.task, " or ".join(get_args(Task)), self.task in get_args(Task)),
                ("degree", self.degree, "a positive number", self.degree > 0),
                ("epochs", self.epochs, "1 or more", self.epochs >= 1),
                ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
                ("learning_rate", self.learning_rate, "above 0", self.learning_rate > 0),
                ("head_learning_rate", self.head_learning_rate, "above 0", self._trains_head()),
                ("max_length", self.max_length, "3 or more", self.max_length >= 3),
                ("seed", self.seed, "0 to 2**32 - 1", 0 <= self.seed < 2**32),
                ("early_stopping", self.early_stopping, "1 or more", self._may_stop()),
                ("dtype", self.dtype, "float32 or bfloat16", self.dtype in ("float32", "bfloat16")),
            )
            if not right
        ]
        if wrong:
            raise UsageError(*wrong)

    @property
    def columns(self) -> Columns:
        """The task with its columns, the defaults filled in."""
        text, label = COLUMNS[self.task]
        return Columns(self.task, self.text_column or text, self.label_column or label)

    def _trains_head(self) -> bool:
        return self.head_learning_rate > 0

    def _may_stop(self) -> bool:
        return self.early_stopping is None or self.early_stopping >= 1


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
