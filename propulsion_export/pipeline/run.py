"""`run`: predict with an artifact."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.chat.templates import no_template, read_template
from propulsion_export.base_model.generation_settings import GenerationSettings
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.data.texts import read_texts
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.pipeline.chat_options import ChatOptions
from propulsion_export.serving.chat import Chat
from propulsion_export.serving.generation import DEFAULT_NEW_TOKENS, OnText, Settings
from propulsion_export.serving.loaded_model import Reply
from propulsion_export.serving.requests import contexts_for, one_each
from propulsion_export.serving.session import Session
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
    trust_remote_code: bool = False,
    chat: bool = False,
    system: str | None = None,
    conversation: Path | None = None,
    on_text: OnText | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Predict for texts, or answer conversations; returns one JSON object for each.

    Besides `text` and `adapter` it holds, by task: `label` and `score`, and for a regression or
    several labels what `classify` says; `tokens`, a list of `word`,
    `label` (None for a given word that the model has not read) and `score`; `answer`, `start`,
    `end` (characters of the context) and `score`;
    `filled`, one word per mask; `embedding`; or, of text that is generated, `generated`, `tokens`
    (their numbers, without the end token) and `stopped`: `end` or `length`. A text longer than the
    model's positions is cut; a prompt that long is refused. For a conversation of a file,
    `messages` takes the place of `text`.

    Args:
        artifact: directory of a merged checkpoint, an ONNX export or an engine.
        text: the texts; for question answering, the questions.
        inputs: file of more texts: one per line (.txt), or JSONL, CSV or Parquet with a column
            `text`, or the column that the task trains on; `tokens` holds lists of words.
        context: for question answering, the text with the answer, for text classification the
            second text of a pair: one for all texts or one for each.
        adapter: names, one for all texts or one for each; default: the only adapter of an artifact
            that is not a bank, else the base model.
        runner: the runtime; `auto`: the default for its kind and dtype.
        max_new_tokens: the most tokens to generate; default: 128, and never more than positions.
        temperature: sample tokens; below 1 prefers likely ones. Without this and the next two,
            decoding is greedy.
        top_k: sample from this many of the likeliest tokens.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: for sampling; default: a different text every time.
        trust_remote_code: run code that a merged checkpoint brings.
        chat: each text is a user's turn, which the chat template renders.
        system: a system turn before each of them.
        conversation: file of conversations to go on with: JSON, or rows with a column `messages`.
        on_text: called with the number of a text, from 0, and the next piece generated for it.
        on_note: called with what to know about the predictions: generation settings of the model
            that are not applied.

    Raises:
        UsageError: there is no text; the numbers of adapters or contexts and of texts differ; an
            option for generating text, for another task; options for chats that do not fit the
            others or the artifact, or a conversation that its chat template refuses.
        UnknownAdapterError: the artifact has no adapter of that name.
        ArtifactError: an output is NaN or infinite, also the logits of a token to generate.
        UnavailableError: this machine cannot run it.
    """
    read = Artifact.read(artifact)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    task = read.manifest.task
    chats = ChatOptions(chat, system, conversation)
    chats.check(task, text=bool(text), inputs=bool(inputs))
    texts: list[Any] = [*text, *(read_texts(inputs, task) if inputs else ())]
    if not texts and conversation is None:
        more = ", or chat on a terminal" if chat else ""
        remedy = f"Give --text or --inputs{more}."
        raise UsageError("no text is given, expected some", remedy=remedy)
    asked = chats.conversations(texts) or texts
    names = one_each("adapters", adapter, len(asked)) if adapter else None
    contexts = contexts_for(task, context, len(asked))
    settings = settings_for(read, options, on_text)
    if settings is not None and on_note is not None:
        note_settings(read, settings, on_note)
    session = Session(read, runner=runner, trust_remote_code=trust_remote_code)
    replies = session(asked, names, context=contexts, settings=settings)
    _check_numbers(read, replies)
    return [
        {**chats.shown(texts, row), "adapter": reply.adapter, **(reply.prediction or {})}
        for row, reply in enumerate(replies)
    ]


def open_chat(
    artifact: Path,
    *,
    adapter: str | None = None,
    system: str | None = None,
    runner: str = "auto",
    options: Mapping[str, Any],
    trust_remote_code: bool = False,
    on_note: Callable[[str], None],
) -> Chat:
    """Load an artifact for a conversation turn by turn.

    Args:
        artifact: as for `predict`, like the others.
        adapter: the adapter that answers.
        system: the system turn.
        runner: the runtime.
        options: those for generating text, by name; None where one is not given.
        trust_remote_code: run code that a merged checkpoint brings.
        on_note: called with what to know about the predictions.

    Raises:
        PropulsionExportError: as `predict`.
    """
    read = Artifact.read(artifact)
    ChatOptions(True, system).check(read.manifest.task)
    settings = settings_for(read, options, None)
    assert settings is not None  # the task generates text
    note_settings(read, settings, on_note)
    _check_template(read, adapter)
    session = Session(read, runner=runner, trust_remote_code=trust_remote_code)
    return Chat(session, adapter, system=system, settings=settings)


def _check_template(artifact: Artifact, adapter: str | None) -> None:
    """Refuse a conversation that no turn of could be rendered.

    Raises:
        UsageError: neither the artifact nor the adapter that answers has a chat template.
    """
    entries = artifact.list_adapters()
    own = any(entry.chat_template for name, entry in entries.items() if adapter in (None, name))
    if not own and read_template(artifact.directory) is None:
        raise no_template()


def note_settings(artifact: Artifact, settings: Settings, on_note: Callable[[str], None]) -> None:
    """Say which generation settings of the model change its text and are not applied."""
    read = GenerationSettings.read(artifact.directory)
    if ignored := read.not_applied(sampling=settings.sampling is not None):
        shown = ", ".join(f"{name} {value}" for name, value in ignored.items())
        on_note(f"{read.file}: not applied: {shown}")


def _check_numbers(artifact: Artifact, replies: Sequence[Reply]) -> None:
    """Refuse what has no prediction; a session leaves that decision to its caller."""
    lost = [(number, reply) for number, reply in enumerate(replies, 1) if reply.has_nan]
    if lost:
        raise ArtifactError(
            *(
                f"{artifact.shown}: computes NaN or infinity with {reply.adapter!r} for "
                f"text {number}{_lost_at(reply)}"
                for number, reply in lost
            ),
            remedy="`propulsion-export parity` shows which check fails.",
        )


def _lost_at(reply: Reply) -> str:
    tokens = (reply.prediction or {}).get("tokens") if not reply.outputs else None
    return "" if tokens is None else f", at generated token {len(tokens) + 1}"


def settings_for(
    artifact: Artifact, options: Mapping[str, Any], on_text: OnText | None
) -> Settings | None:
    """The settings for generating text from the options given; None for another task."""
    task = artifact.manifest.task
    given = {name: value for name, value in options.items() if value is not None}
    if not TASKS[task].generates:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{names}: for generating text, the artifact is for {task}")
        return None
    sampling = {name: value for name, value in given.items() if name in _OF_SAMPLING}
    return Settings(
        new_tokens=given.get("max_new_tokens", DEFAULT_NEW_TOKENS),
        sampling=Sampling(**sampling) if sampling else None,
        seed=given.get("seed"),
        on_text=on_text,
    )
