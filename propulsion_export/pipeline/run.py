"""`run`: predict with an artifact."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.serving.generation import DEFAULT_NEW_TOKENS, OnText, Settings
from propulsion_export.serving.requests import contexts_for, one_each
from propulsion_export.serving.session import Reply, Session
from propulsion_export.serving.text_files import read_texts
from propulsion_export.serving.token_sampling import Sampling

_OF_SAMPLING = ("temperature", "top_k", "top_p")


def predict(
    artifact: Path,
    *,
    text: Sequence[str] = (),
    inputs: Path | None = None,
    context: Sequence[str] = (),
    adapter: Sequence[str] = (),
    runner: str = "auto",
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
        adapter: names, one for all texts or one for each; default: the only one of an artifact that
            is no bank, or the base model.
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
        UnknownAdapterError: the artifact has no adapter of a name.
        ArtifactError: it computes NaN.
        UnavailableError: this machine cannot run it.
    """
    read = Artifact.read(artifact)
    texts = [*text, *(read_texts(inputs) if inputs else ())]
    if not texts:
        raise UsageError("no text is given, expected some", remedy="Give --text or --inputs.")
    names = one_each("adapters", adapter, len(texts)) if adapter else None
    contexts = contexts_for(read.manifest.task, context, len(texts))
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    settings = _settings(read, options, on_text)
    session = Session(read, runner=runner)
    replies = session(texts, names, context=contexts, settings=settings)
    _check_numbers(read, replies)
    return [
        {"text": one, "adapter": reply.adapter, **(reply.prediction or {})}
        for one, reply in zip(texts, replies, strict=True)
    ]


def _check_numbers(artifact: Artifact, replies: Sequence[Reply]) -> None:
    """Refuse predictions that would be made of NaN; a session leaves that to who calls it."""
    lost = {reply.adapter for reply in replies if reply.has_nan}
    if lost:
        raise ArtifactError(
            *(f"{artifact.directory}: computes NaN with {name!r}" for name in sorted(lost)),
            remedy="`propulsion-export parity` tells where that begins.",
        )


def _settings(
    artifact: Artifact, options: Mapping[str, Any], on_text: OnText | None
) -> Settings | None:
    """How to generate, of the options that were given; None for another task."""
    task = artifact.manifest.task
    given = {name: value for name, value in options.items() if value is not None}
    if not TASKS[task].generates:
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
