"""Answer texts with a model that does not generate: one prediction per text."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.positions import as_config, longest_input
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer import (
    encode_texts,
    read_serving_tokenizer,
    tensors_of,
)
from propulsion_export.errors import UsageError
from propulsion_export.serving.predictions import Outcome, predict_row


@dataclass(frozen=True)
class Answer:
    """The model's outputs for one text, without padding, and the prediction."""

    outputs: Tensors
    prediction: dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """A model that reads texts, ready for any batch.

    Attributes:
        run: the model.
        tokenizer: the artifact's tokenizer.
        names: the inputs that the model reads.
        limit: most tokens of a text; longer texts are cut.
        task: the task that the model was exported for.
        one_at_a_time: held while encoding: a call sets how the tokenizer cuts and pads, and some
            versions of tokenizers raise "Already borrowed" if another thread encodes meanwhile.
    """

    run: Runner
    tokenizer: Any
    names: tuple[str, ...]
    limit: int
    task: str
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def read(
        self,
        texts: Sequence[str],
        contexts: Sequence[str],
        feeds: Mapping[str, Any],
        labels: Sequence[Sequence[str] | None],
        problem_types: Sequence[ProblemType | None],
    ) -> Iterator[Answer]:
        """Answer texts in one batch.

        Args:
            texts: one text per row.
            contexts: the second text of each row, with the answer to a question; may be empty.
            feeds: the adapters' inputs.
            labels: the class names for each row.
            problem_types: what the logits of each row mean.
        """
        with self.one_at_a_time:
            encoding = encode_texts(
                self.names,
                self.tokenizer,
                list(texts),
                limit=self.limit,
                contexts=list(contexts) or None,
            )
        tensors = tensors_of(self.names, encoding)
        if "token_type_ids" in tensors and not self._tells_texts_apart():
            tensors["token_type_ids"] = np.zeros_like(tensors["token_type_ids"])
        outputs = self.run({**tensors, **feeds})
        for row, source in enumerate(contexts or texts):
            outcome = Outcome(
                source=source,
                tokens=encoding.encodings[row] if encoding.encodings else None,
                ids=encoding["input_ids"][row],
                mask=encoding["attention_mask"][row].astype(bool),
                outputs={name: values[row] for name, values in outputs.items()},
                labels=labels[row],
                problem_type=problem_types[row],
            )
            yield Answer(self._own(outcome), predict_row(self.task, outcome, self.tokenizer))

    def _tells_texts_apart(self) -> bool:
        """Whether a model sees which text of a pair a token is of: as in transformers' pipeline."""
        names = self.tokenizer.model_input_names
        return TASKS[self.task].prediction != "class" or "token_type_ids" in names

    def _own(self, outcome: Outcome) -> Tensors:
        """A row's outputs without those for padding, which depend on the rest of the batch."""
        padded = TASKS[self.task].token_outputs
        return {
            name: values[outcome.mask] if name in padded else values
            for name, values in outcome.outputs.items()
        }


def open_reader(artifact: Artifact, run: Runner) -> Reader:
    """Prepare an artifact to answer texts.

    Raises:
        UsageError: it has no tokenizer, or one that does not say where in a text a token stands.
        UnavailableError: its tokenizer needs transformers, which is not installed.
    """
    tokenizer = read_serving_tokenizer(artifact.directory)
    if tokenizer is None:
        raise UsageError(f"{artifact.directory}: has no tokenizer to read texts with")
    if TASKS[artifact.manifest.task].needs_offsets and not tokenizer.is_fast:
        raise UsageError(
            f"{artifact.directory}: has a tokenizer that does not say where in a text a token "
            "stands, expected a fast tokenizer (tokenizer.json)"
        )
    config = as_config(read_settings(artifact.directory))
    names: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")
    known = {spec.name for spec in artifact.manifest.inputs} or set(names)
    if getattr(config, "type_vocab_size", 0) <= 1:
        known -= {"token_type_ids"}  # the model has no type for a second text
    names = tuple(name for name in names if name in known)
    limit = longest_input(config, tokenizer)
    return Reader(run, tokenizer, names, limit, artifact.manifest.task)
