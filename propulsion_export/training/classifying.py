"""Training runs for text and token classification."""

from pathlib import Path
from typing import Any

import torch
import transformers

from propulsion_export.environment.paths import user_path
from propulsion_export.training.data import (
    Example,
    check_labels_known,
    classes_of,
    hold_out,
    read_examples,
)
from propulsion_export.training.encode import Rows, encode
from propulsion_export.training.head import head_only_accuracy
from propulsion_export.training.losses import guesses_and_losses, mean_cross_entropy
from propulsion_export.training.metrics import class_scores
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.run import Data, Objective, TrainingRun


class ClassifierRun(TrainingRun[Example]):
    """Trains a head with the adapter; the comparison is the head alone on the frozen base model."""

    objective = Objective(mean_cross_entropy, guesses_and_losses, class_scores)
    head_accuracy: float | None = None

    @staticmethod
    def read(source: Path, options: TrainOptions) -> Data[Example]:
        examples = read_examples(source, options.columns)
        classes = tuple(classes_of(source, examples))
        if options.validation is None:
            training, validation = hold_out(
                source, examples, options.seed, stratum=lambda example: example.stratum
            )
            part = "each class" if options.task_entry.prediction == "class" else "the rows"
            origin = f"a tenth of {part} of {source.name}, held out with seed {options.seed}"
            return Data(training, validation, origin, classes)
        file = user_path(options.validation)
        validation = read_examples(file, options.columns)
        check_labels_known(file, validation, classes)
        return Data(examples, validation, file.name, classes)

    def encoded(self) -> Rows:
        data, tokenizer = self.data, self.base.tokenizer
        collator = transformers.DataCollatorForTokenClassification
        if self.options.task_entry.prediction == "class":
            collator = transformers.DataCollatorWithPadding
        return Rows(
            encode(data.training, data.classes, tokenizer, self.longest),
            encode(data.validation, data.classes, tokenizer, self.longest),
            collator(tokenizer),
        )

    def before_adapter(self, device: torch.device) -> str:
        if not self.options.head_only:
            return "loaded"
        if self.base.absent:
            self.notes.append(
                f"The base model's checkpoint has no {', '.join(self.base.absent)}: trained and "
                "saved with the head; the accuracy of the head alone is not measured."
            )
            return "loaded"
        self.head_accuracy = head_only_accuracy(self.base, self.rows, self.options, device)
        if self.head_accuracy is None:
            self.notes.append(
                "The training of the head alone diverged: its accuracy is not measured. Choose a "
                "lower --head-learning-rate."
            )
        return "trained the head alone"

    def described(self) -> dict[str, Any]:
        return {"labels": list(self.data.classes), "head_only_accuracy": self.head_accuracy}
