"""Answer texts with a model that does not generate: one prediction per text."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.eos_pooling import check_eos, pools_at_eos
from propulsion_export.base_model.model_inputs import (
    TEXT_INPUTS,
    check_text_is_enough,
    extra_inputs,
)
from propulsion_export.base_model.positions import as_config, longest_input
from propulsion_export.base_model.rope_switch import rope_switches, side_of
from propulsion_export.base_model.sentences.texts import SentenceTexts, open_sentence_texts
from propulsion_export.base_model.settings import ProblemType
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.cutting import TextCutter
from propulsion_export.base_model.tokenizer.reading import (
    encode_texts,
    read_serving_tokenizer,
    tensors_of,
)
from propulsion_export.base_model.tokenizer.token_ids import (
    check_encoded,
    check_token_ids,
    embedding_rows,
)
from propulsion_export.base_model.tokenizer.words import joined
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.runners.switching import feeds_of_rows
from propulsion_export.serving.predictions import Outcome, predict_row


@dataclass(frozen=True)
class TextRow:
    """One text to answer.

    Attributes:
        text: the text, or its words.
        context: the second text: with the answer to a question, or of a pair; else None.
        labels: the class names of the row's adapter; None where it has none.
        problem_type: what the row's logits mean.
    """

    text: str | Sequence[str]
    context: str | None = None
    labels: Sequence[str] | None = None
    problem_type: ProblemType | None = None


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
        sentence: how embeddings are made; None for other tasks, and without a pipeline.
        switches: lengths above which the model's rotary frequencies are others; rows on two sides
            of one are computed apart, because the longest row of a batch decides for all.
        embeddings: how many tokens the model has embeddings for; None where it does not say.
        config: the model's configuration.
        one_at_a_time: held while encoding: a call sets how the tokenizer cuts and pads, and some
            versions of tokenizers raise "Already borrowed" if another thread encodes meanwhile.
    """

    run: Runner
    tokenizer: Any
    names: tuple[str, ...]
    limit: int
    task: str
    sentence: SentenceTexts | None = None
    switches: tuple[int, ...] = ()
    embeddings: int | None = None
    config: Any = None
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def read(self, rows: Sequence[TextRow], feeds: Mapping[str, Any]) -> Iterator[Answer]:
        """Answer texts in one batch.

        Args:
            rows: the texts; all have a context, or none has.
            feeds: the adapters' inputs.
        """
        texts = self._as_read(rows)
        contexts = [row.context for row in rows if row.context is not None] or None
        places = TASKS[self.task].needs_offsets
        with self.one_at_a_time:
            kept, of_contexts = self._cutter.cut(texts, contexts, self.limit, with_places=places)
            encoding = encode_texts(
                self.names, self.tokenizer, kept, limit=self.limit, contexts=of_contexts
            )
        _check_some_tokens(rows, encoding["attention_mask"])
        check_encoded(encoding["input_ids"], self.embeddings)
        sides = [side_of(int(mask.sum()), self.switches) for mask in encoding["attention_mask"]]
        if len(set(sides)) > 1:
            yield from self._read_by_side(sides, rows, feeds)
            return
        if pools_at_eos(self.config, self.task):
            check_eos(encoding["input_ids"], self.config, texts)
        tensors = tensors_of(self.names, encoding)
        if "token_type_ids" in tensors and not self._tells_texts_apart():
            tensors["token_type_ids"] = np.zeros_like(tensors["token_type_ids"])
        outputs = self.run({**tensors, **feeds})
        for index, row in enumerate(rows):
            source = row.text if row.context is None else row.context
            outcome = Outcome(
                source=joined(source),
                tokens=encoding.encodings[index] if encoding.encodings else None,
                ids=encoding["input_ids"][index],
                mask=encoding["attention_mask"][index].astype(bool),
                outputs={name: values[index] for name, values in outputs.items()},
                labels=row.labels,
                sentence=self.sentence,
                words=None if isinstance(source, str) else source,
                problem_type=row.problem_type,
            )
            yield Answer(self._own(outcome), predict_row(self.task, outcome, self.tokenizer))

    @cached_property
    def _cutter(self) -> TextCutter:
        return TextCutter(self.tokenizer)

    def _as_read(self, rows: Sequence[TextRow]) -> list[str]:
        """Each text as the model reads it: words joined, behind the sentence pipeline's prompt."""
        read = [joined(row.text) for row in rows]
        return self.sentence.with_prompt(read) if self.sentence else read

    def _read_by_side(
        self, sides: Sequence[int], rows: Sequence[TextRow], feeds: Mapping[str, Any]
    ) -> Iterator[Answer]:
        """Answer the rows of each side in a batch of their own; in the order of the texts."""
        answers: dict[int, Answer] = {}
        for side in set(sides):
            own = [index for index, other in enumerate(sides) if other == side]
            read = self.read([rows[index] for index in own], feeds_of_rows(feeds, own))
            answers |= dict(zip(own, read, strict=True))
        return iter([answers[index] for index in range(len(rows))])

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


def _check_some_tokens(rows: Sequence[TextRow], mask: Any) -> None:
    if empty := [joined(row.text) for row, own in zip(rows, mask, strict=True) if not own.sum()]:
        raise UsageError(*(f"text {text[:40]!r}: has no tokens, expected some" for text in empty))


def open_reader(artifact: Artifact, run: Runner) -> Reader:
    """Prepare an artifact to answer texts.

    Raises:
        ArtifactError: its tokenizer cannot be read, or has tokens beyond the model's embedding.
        UsageError: it has no tokenizer, or one that does not say where in a text a token stands.
        UnavailableError: its tokenizer needs transformers, which is not installed.
    """
    tokenizer = read_serving_tokenizer(artifact.directory)
    if tokenizer is None:
        raise UsageError(f"{artifact.directory}: has no tokenizer to read texts with")
    settings = read_settings(artifact.directory)
    check_token_ids(str(artifact.directory), tokenizer, settings, ArtifactError)
    if TASKS[artifact.manifest.task].needs_offsets and not tokenizer.is_fast:
        raise UsageError(
            f"{artifact.directory}: has a tokenizer that does not say where in a text a token "
            "stands, expected a fast tokenizer (tokenizer.json)"
        )
    config = as_config(settings)
    extras = extra_inputs(config)
    check_text_is_enough(extras, str(artifact.directory))
    names = (*TEXT_INPUTS, *(extra.name for extra in extras))
    known = {spec.name for spec in artifact.manifest.inputs} or set(names)
    if getattr(config, "type_vocab_size", 0) <= 1:
        known -= {"token_type_ids"}  # the model has no type for a second text
    names = tuple(name for name in names if name in known)
    limit = longest_input(config, tokenizer)
    task = artifact.manifest.task
    sentence = None
    if TASKS[task].prediction == "embedding":
        sentence = open_sentence_texts(artifact.directory, tokenizer)
    limit = limit if sentence is None else sentence.limit
    return Reader(
        run,
        tokenizer,
        names,
        limit,
        task,
        sentence,
        rope_switches(settings),
        embedding_rows(settings),
        config,
    )
