"""Judge the embedding of a text too, as the base model's sentence pipeline computes it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from propulsion_export.artifacts.artifact import Runner, Tensors
from propulsion_export.base_model.sentences.pipeline import SENTENCE, SentencePipeline
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject

_HIDDEN = "last_hidden_state"


def with_embeddings(
    subjects: Sequence[Subject], batches: Sequence[Tensors], pipeline: SentencePipeline
) -> list[Subject]:
    """The subjects with `sentence_embedding`, float64 [rows, width], among their outputs."""
    add = partial(_with_embedding, pipeline)
    return [
        replace(
            subject,
            oracle=tuple(map(add, batches, subject.oracle)),
            reference=tuple(map(add, batches, subject.reference)),
            unscaled=None
            if subject.unscaled is None
            else tuple(map(add, batches, subject.unscaled)),
        )
        for subject in subjects
    ]


def embedding(run: Runner, pipeline: SentencePipeline) -> Runner:
    """A runner that also returns `sentence_embedding`, made of its own last hidden state."""
    return lambda inputs: _with_embedding(pipeline, inputs, run(inputs))


def check_pooling(expected: SentencePipeline | None, found: SentencePipeline | None) -> Check:
    """Check that an artifact embeds texts as its base model and adapters do."""
    if expected is None and found is None:
        detail = "there is no sentence pipeline: the token vectors are compared, not their mean"
        return Check("pooling", "all", True, detail)
    if expected is not None and expected.is_same_as(found):
        detail = f"sentence embeddings ({expected.label}) are compared with the token vectors"
        return Check("pooling", "all", True, detail)
    labels = ["none" if each is None else each.label for each in (found, expected)]
    detail = f"the artifact has the sentence pipeline {labels[0]}, its base model {labels[1]}"
    return Check("pooling", "all", False, detail)


def _with_embedding(pipeline: SentencePipeline, inputs: Tensors, outputs: Tensors) -> Tensors:
    if _HIDDEN not in outputs:  # compared as a missing output
        return outputs
    mask = inputs["attention_mask"]
    return {**outputs, SENTENCE: pipeline.embed_batch(outputs[_HIDDEN], mask)}
