"""Which sentence pipeline an artifact gets: its base model's, or one that its adapters bring."""

from collections.abc import Sequence

from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.sentences.pipeline import SentencePipeline
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import AdapterError


def sentence_source(base: str, task: str, directories: Sequence[str]) -> str | None:
    """Where the pipeline of an artifact lies; None where neither side has one.

    sentence-transformers writes one into the directories of its adapters.

    Args:
        base: the base model, a directory or a name on a hub.
        task: only artifacts for feature extraction have a pipeline.
        directories: of the adapters, all of which have to mean the same pipeline.

    Raises:
        AdapterError: the adapters need different pipelines.
        BaseModelError: a pipeline cannot be computed here.
    """
    if TASKS[task].prediction != "embedding":
        return None
    places = {base: read_sentence_pipeline(base)}
    places |= {place: own for place in directories if (own := read_sentence_pipeline(place))}
    needed = {place: place if place in places else base for place in directories}
    chosen = next(iter(needed.values()), base)
    for directory, place in needed.items():
        if not _same(places[place], places[chosen]):
            raise AdapterError(
                f"{directory}: needs the sentence pipeline {_label(places[place])}, expected "
                f"{_label(places[chosen])} with {chosen} as for the adapters before it",
                remedy="Export them apart.",
            )
    if _same(places[base], places[chosen]):
        chosen = base  # whose files also say how long a text may be
    return None if places[chosen] is None else chosen


def check_sentence_pipeline(artifact: str, task: str, directory: str) -> None:
    """Refuse an adapter that brings another pipeline than the artifact has.

    Raises:
        AdapterError: it does.
        BaseModelError: its pipeline cannot be computed here.
    """
    if TASKS[task].prediction != "embedding":
        return
    own = read_sentence_pipeline(directory)
    if own is not None and not own.is_same_as(read_sentence_pipeline(artifact)):
        raise AdapterError(
            f"{directory}: has the sentence pipeline {own.label}, expected the one of {artifact}",
            remedy="Export it in an artifact of its own.",
        )


def _same(one: SentencePipeline | None, other: SentencePipeline | None) -> bool:
    return one is other if one is None else one.is_same_as(other)


def _label(pipeline: SentencePipeline | None) -> str:
    return "none" if pipeline is None else pipeline.label
