"""The options of a training run, named as the long options of the command."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from propulsion_export.base_model.tasks import TASKS, TRAINED_TASKS, Task, Training
from propulsion_export.errors import UsageError
from propulsion_export.training.data import Columns

# An option, the expected value in words, and a check for it.
_Rule = tuple[str, str, Callable[[Any], bool]]

_HEAD_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class TrainOptions:
    """How to train an adapter.

    The defaults were the best of the settings tried on the samples' WordNet topics.

    Attributes:
        task: one of `TRAINED_TASKS`. Text generation learns texts, responses to prompts, or what
            the assistant says in conversations; its lm_head is not trained.
        text_column: the column of the inputs; by default `text`, `tokens` (a list of words) or, if
            there are responses, `prompt`.
        label_column: the column of the labels; by default `label`, `labels` (one per word) or
            `response`. For text generation with `text_column` alone, that column holds the texts
            to learn, or the conversations.
        chat_template: file with the chat template to learn conversations with; by default the base
            model's.
        validation: data to validate on after each epoch; by default a tenth of the data is held
            out.
        placement: `attention`, `all`, or a regular expression for module paths.
        degree: the power that the trained vectors are raised to.
        train_bias: train the biases of the wrapped layers too.
        epochs: passes over the training data.
        batch_size: examples per optimiser step, over all processes together; blocks, with
            `packing`.
        gradient_accumulation_steps: parts in which each batch is computed, to save memory; without
            dropout the adapter is the same within float error.
        learning_rate: learning rate of the vectors and biases; falls linearly to 0.
        head_learning_rate: learning rate of a classifier's head; falls linearly to 0.
        max_length: longest text in tokens, less if the base model takes less; longer ones are cut.
            By default 128, or 512 for generated text, where the notes count the cut rows.
        packing: put several passages into blocks of `max_length` tokens, to have less padding; text
            generation only. No passage attends to another; a base model that cannot keep them
            apart is refused. A text without a prompt goes on in another block instead of being cut.
        seed: seed for the held-out rows, the head's first values, the order of rows and dropout.
        early_stopping: stop after so many epochs without a better validation accuracy, or a lower
            validation loss for generated text, and keep the best epoch; by default all epochs run
            and the last is kept.
        gradient_checkpointing: compute activations again in the backward pass to save memory.
        dtype: dtype of the frozen base model; vectors, biases and head are trained in float32.
        trust_remote_code: run code from the model directory.
        head_only: also train a classifier's head alone, to measure what the adapter adds. Generated
            text is compared with the base model in any case.
        resume: continue from the checkpoint of an interrupted run with the same options.
        force: replace an existing adapter at the output.
    """

    task: str = "text-classification"
    text_column: str | None = None
    label_column: str | None = None
    chat_template: Path | None = None
    validation: Path | None = None
    placement: str = "all"
    degree: float = 15
    train_bias: bool = False
    epochs: int = 3
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    head_learning_rate: float = _HEAD_LEARNING_RATE
    max_length: int | None = None
    packing: bool = False
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
            for name, expected, right in (*self._numbers(), *self._choices())
            if not right(value := getattr(self, name))
        ]
        if wrong:
            raise UsageError(*wrong)

    @property
    def task_entry(self) -> Task:
        """The task in the table of tasks."""
        return TASKS[self.task]

    @property
    def training(self) -> Training:
        """How adapters are trained for the task."""
        training = self.task_entry.training
        assert training is not None  # as __post_init__ has checked
        return training

    @property
    def columns(self) -> Columns:
        """The task with the chosen columns."""
        return Columns(self.task, self.text_column, self.label_column)

    @staticmethod
    def _numbers() -> tuple[_Rule, ...]:
        def count(value: Any) -> bool:
            return bool(value >= 1)

        def positive(value: Any) -> bool:
            return bool(value > 0)

        return (
            ("degree", "a positive number", positive),
            ("epochs", "1 or more", count),
            ("batch_size", "1 or more", count),
            ("gradient_accumulation_steps", "1 or more", count),
            ("learning_rate", "above 0", positive),
            ("head_learning_rate", "above 0", positive),
            ("max_length", "3 or more", lambda value: value is None or value >= 3),
            ("seed", "0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
            ("early_stopping", "1 or more", lambda value: value is None or value >= 1),
        )

    def _choices(self) -> tuple[_Rule, ...]:
        """The rules for options that depend on the task or allow a few values."""
        generates = self.task in TRAINED_TASKS and self.task_entry.generates
        return (
            ("task", " or ".join(TRAINED_TASKS), lambda value: value in TRAINED_TASKS),
            ("dtype", "float32 or bfloat16", lambda value: value in ("float32", "bfloat16")),
            (
                "packing",
                f"none for --task {self.task}: it packs the passages of text-generation",
                lambda value: not value or self._is_decoder(),
            ),
            (
                "chat_template",
                f"none for --task {self.task}: it is for the conversations of text-generation",
                lambda value: value is None or self._is_decoder(),
            ),
            (
                "head_learning_rate",
                f"none for --task {self.task}: it trains no head",
                lambda value: not generates or value == _HEAD_LEARNING_RATE,
            ),
            (
                "head_only",
                f"no value for --task {self.task}: it trains no head",
                lambda value: not generates or value,
            ),
        )

    def _is_decoder(self) -> bool:
        return self.task in TRAINED_TASKS and self.task_entry.architecture == "decoder"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
