"""`run`: predict with an artifact."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.artifact import Artifact, Runner
from propulsion_export.choosing import Sampling
from propulsion_export.errors import UsageError
from propulsion_export.lengths import longest_input
from propulsion_export.manifest import BASE_NAME
from propulsion_export.pipeline.agreeing import check_signature
from propulsion_export.pipeline.describing import Outcome, describe
from propulsion_export.pipeline.generating import (
    DEFAULT_NEW_TOKENS,
    OnText,
    Settings,
    open_writer,
)
from propulsion_export.pipeline.inputs import read_texts
from propulsion_export.pipeline.running import RunnerName, choose_runner, open_candidate

_ROWS = 32  # in a batch, at most: what an engine takes by default
# Their predictions are spans of the text, which only a fast tokenizer can find again.
_OF_SPANS = ("token-classification", "question-answering")
_OF_SAMPLING = ("temperature", "top_k", "top_p")
# Predicts for the texts of these numbers with one adapter.
_Answer = Callable[[str | None, list[int]], Iterable[dict[str, Any]]]


def predict(
    artifact: Path,
    *,
    text: Sequence[str] = (),
    inputs: Path | None = None,
    context: Sequence[str] = (),
    adapter: Sequence[str] = (),
    runner: RunnerName = "auto",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_text: OnText | None = None,
) -> list[dict[str, Any]]:
    """Predict for texts; one plain JSON value a text.

    Beside `text` and `adapter` it has, by task: `label` and `score`; `tokens`, a list of `word`,
    `label` and `score`; `answer`, `start`, `end` (characters of the context) and `score`;
    `filled`, a word a mask; `embedding`; or, of text that is generated, `generated`, `tokens`
    (numbers, without the one that ends it) and `stopped`: `end` or `length`. A text longer than
    the model's positions is cut; one to go on with is refused.

    Args:
        artifact: directory of a merged checkpoint, an ONNX export or an engine.
        text: the texts; for question answering, the questions.
        inputs: more of them, a line each (.txt) or JSONL with `text`.
        context: where the answers stand, one for all questions or one for each.
        adapter: names, one for all texts or one for each; default: the only one, or the base model.
        runner: what runs it.
        max_new_tokens: to generate, at most; default: 128. Never more than there are positions.
        temperature: draw tokens, likely ones more (below 1) or less often. Without this and the
            next two, each token is the likeliest one.
        top_k: draw from so many of the likeliest tokens.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the drawing; default: another text every time.
        on_text: told the number of a text, from 0, and the next piece that is generated for it.

    Raises:
        UsageError: there is no text, or another number of adapters or contexts than of texts; an
            option of generating for another task.
        ArtifactError: the artifact has no such adapter.
        UnavailableError: this machine cannot run it.
    """
    read = Artifact.read(artifact)
    texts = [*text, *(read_texts(inputs) if inputs else ())]
    if not texts:
        raise UsageError("no text is given, expected some", remedy="Give --text or --inputs.")
    names = _adapters(read, adapter, len(texts))
    contexts = _contexts(read.manifest.task, context, len(texts))
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    settings = _settings(read, options, on_text)
    check_signature(read)
    for name in dict.fromkeys(names):
        read.feeds(name)  # one that is not there is told now, not behind the others' texts
    if settings is None:
        answer = _describer(read, runner, texts, contexts)
    else:
        answer = _writer(read, runner, texts, settings)
    predictions: dict[int, dict[str, Any]] = {}
    for name, rows in _batches(names):
        told = (
            {"text": texts[row], "adapter": name or BASE_NAME, **described}
            for row, described in zip(rows, answer(name, rows), strict=True)
        )
        predictions.update(zip(rows, told, strict=True))
    return [predictions[row] for row in range(len(texts))]


def _settings(
    artifact: Artifact, options: Mapping[str, Any], on_text: OnText | None
) -> Settings | None:
    """How to generate, of the options that were given; None for another task."""
    from propulsion_export.base import GENERATIVE_TASKS

    task = artifact.manifest.task
    given = {name: value for name, value in options.items() if value is not None}
    if task not in GENERATIVE_TASKS:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{names}: for generating text, the artifact is for {task}")
        return None
    drawn = {name: value for name, value in given.items() if name in _OF_SAMPLING}
    return Settings(
        new_tokens=given.get("max_new_tokens", DEFAULT_NEW_TOKENS),
        sampling=Sampling(**drawn) if drawn else None,
        seed=given.get("seed"),
        on_text=on_text,
    )


def _writer(
    artifact: Artifact, runner: RunnerName, texts: Sequence[str], settings: Settings
) -> _Answer:
    """Generates text; what cannot be a prompt is refused before anything is generated."""
    writer = open_writer(artifact, runner, settings)
    prompts = [writer.encode(text, number) for number, text in enumerate(texts)]

    def answer(name: str | None, rows: list[int]) -> Iterable[dict[str, Any]]:
        return writer.write([prompts[row] for row in rows], rows, artifact.feeds(name))

    return answer


def _describer(
    artifact: Artifact,
    runner: RunnerName,
    texts: Sequence[str],
    contexts: Sequence[str | None],
) -> _Answer:
    """Tells what a model's outputs mean."""
    encoder = _encoder(artifact)
    run = open_candidate(artifact, choose_runner(artifact, runner))
    assert callable(run)  # of a task that generates nothing it is no generator

    def answer(name: str | None, rows: list[int]) -> Iterable[dict[str, Any]]:
        batch = _Batch(name, [texts[row] for row in rows], [contexts[row] for row in rows])
        return _run(artifact, run, encoder, batch)

    return answer


@dataclass(frozen=True)
class _Encoder:
    """The artifact's tokenizer, the inputs its model reads, and how many tokens it takes."""

    tokenizer: Any
    names: tuple[str, ...]
    limit: int


@dataclass(frozen=True)
class _Batch:
    """Texts that are run together: all of one adapter."""

    adapter: str | None
    texts: list[str]
    contexts: list[str | None]

    @property
    def sources(self) -> list[str]:
        """The texts that predictions are spans of."""
        pairs = zip(self.texts, self.contexts, strict=True)
        return [text if context is None else context for text, context in pairs]


def _adapters(artifact: Artifact, given: Sequence[str], count: int) -> Sequence[str | None]:
    if given:
        return _one_each("adapters", given, count)
    known = artifact.manifest.adapters
    return [next(iter(known)) if len(known) == 1 else None] * count


def _contexts(task: str, given: Sequence[str], count: int) -> Sequence[str | None]:
    if task == "question-answering":
        if not given:
            raise UsageError(
                "question-answering: no context is given, expected the text that holds the answer",
                remedy="Give --context.",
            )
        return _one_each("contexts", given, count)
    if given:
        raise UsageError(f"--context: is for question-answering, the artifact is for {task}")
    return [None] * count


def _one_each(what: str, given: Sequence[str], count: int) -> Sequence[str]:
    if len(given) not in (1, count):
        raise UsageError(f"{len(given)} {what} for {count} texts, expected one, or one each")
    return given if len(given) == count else [given[0]] * count


def _batches(names: Sequence[str | None]) -> Iterator[tuple[str | None, list[int]]]:
    """The numbers of the rows that go together, by adapter: one is fed to a whole batch."""
    for name in dict.fromkeys(names):
        rows = [index for index, other in enumerate(names) if other == name]
        for start in range(0, len(rows), _ROWS):
            yield name, rows[start : start + _ROWS]


def _encoder(artifact: Artifact) -> _Encoder:
    from propulsion_export.base import read_config, read_tokenizer

    tokenizer = read_tokenizer(artifact.directory)
    if tokenizer is None:
        raise UsageError(f"{artifact.directory}: has no tokenizer to read texts with")
    if artifact.manifest.task in _OF_SPANS and not tokenizer.is_fast:
        raise UsageError(
            f"{artifact.directory}: has a tokenizer that cannot tell where in a text a token "
            "stands, expected a fast tokenizer (tokenizer.json)"
        )
    config = read_config(str(artifact.directory))
    names: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")
    known = {spec.name for spec in artifact.manifest.inputs} or set(names)
    if getattr(config, "type_vocab_size", 0) <= 1:
        known -= {"token_type_ids"}  # a second text would be of a type that the model has not
    names = tuple(name for name in names if name in known)
    return _Encoder(tokenizer, names, longest_input(config, tokenizer))


def _run(
    artifact: Artifact, run: Runner, encoder: _Encoder, batch: _Batch
) -> Iterator[dict[str, Any]]:
    """The predictions for a batch, in the order of its texts."""
    from propulsion_export.sampling import encode_texts, tensors_of

    contexts = [context for context in batch.contexts if context is not None]
    encoding = encode_texts(
        encoder.names,
        encoder.tokenizer,
        batch.texts,
        limit=encoder.limit,
        contexts=contexts or None,
    )
    tensors = tensors_of(encoder.names, encoding)
    outputs = run({**tensors, **artifact.feeds(batch.adapter)})
    for row, source in enumerate(batch.sources):
        outcome = Outcome(
            source=source,
            tokens=encoding.encodings[row] if encoding.encodings else None,
            ids=encoding["input_ids"][row],
            mask=encoding["attention_mask"][row].astype(bool),
            outputs={name: values[row] for name, values in outputs.items()},
            labels=_labels(artifact, batch.adapter),
        )
        yield describe(artifact.manifest.task, outcome, encoder.tokenizer)


def _labels(artifact: Artifact, name: str | None) -> Sequence[str] | None:
    entries = artifact.manifest.adapters
    if name is None or name == BASE_NAME:
        return artifact.manifest.base.labels
    return entries[name].labels
