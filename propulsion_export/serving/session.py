"""`Session`: an artifact loaded once that answers many requests, each row with its adapter."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bound_directory import BoundDirectory, deleted
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.consistency import check_consistent
from propulsion_export.artifacts.locking import shared_lock
from propulsion_export.environment.forking import refuse_fork
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import UnknownAdapterError, UsageError
from propulsion_export.runners.opening import choose_runner, place_for
from propulsion_export.serving.conversations import conversations_in
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.loaded_model import LoadedModel, Reply
from propulsion_export.serving.requests import (
    Inputs,
    check_inputs,
    check_names,
    check_texts,
    contexts_for,
    count_rows,
    one_each,
)
from propulsion_export.serving.roster import (
    BankRoster,
    Group,
    PackedRoster,
    Roster,
    check_same_model,
)
from propulsion_export.serving.weights import Weights

_ROWS = 32  # most rows of a batch: what an engine takes by default


class Session:
    """A loaded artifact; any number of threads may call it at the same time.

    A request uses the adapters that there are when it begins, whatever is added, replaced or
    removed meanwhile. The next request sees what this session changed. A new name that another
    process added is found when a request names it; all other changes by others are seen after
    `refresh`.

    A session is bound to the directory that its path leads to when it is opened. All that it needs
    of it but the adapters is read then; a link that is repointed, or a directory that is deleted or
    replaced, changes nothing until `refresh` looks where the path leads.

    A session belongs to the process that opened it, because a fork has none of a runtime's
    threads. Unpickling a session opens the same artifact again.

    Args:
        artifact: a merged checkpoint, an ONNX export or an engine, or its directory.
        runner: the runtime; `auto`: the default for its kind and dtype.
        trust_remote_code: run code that a merged checkpoint brings; a graph needs none.

    Raises:
        ArtifactError: it is damaged, of a newer schema, its manifest contradicts itself or the
            graph, or it was replaced while it was read.
        UnavailableError: this machine cannot run it.
    """

    def __init__(
        self,
        artifact: Path | str | Artifact,
        *,
        runner: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self._place = _bind(artifact)
        read = artifact if isinstance(artifact, Artifact) else _read(self._place)
        read = _in(self._place, read)
        check_consistent(read.directory, read.manifest)
        self._artifact = read
        self._runner = choose_runner(read, runner)
        self._trusted = trust_remote_code
        self._weights = Weights(read)
        self._model = LoadedModel(read, self._runner, trust_remote_code=trust_remote_code)
        self._put = place_for(self._runner)
        self._refreshing, self._following = threading.Lock(), threading.Lock()
        self._process = os.getpid()
        self._roster = self._read_roster(read, None)
        self._place.check_there()

    def __repr__(self) -> str:
        return (
            f"<Session of {self._place.path}: {self._artifact.manifest.task}, "
            f"{self._runner}, {len(self.adapters)} adapters>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self._place.given, self._place.path, self._runner, self._trusted)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters there are now, sorted, without `base`."""
        return self._roster.names

    @property
    def settings_not_applied(self) -> dict[str, Any]:
        """Settings for generating text in the artifact's files that would change it, by name.

        Those of other searches than token by token, and where `do_sample` is on those of sampling:
        pass `Settings(sampling=...)` to sample. Empty for other tasks.
        """
        return self._model.settings_not_applied()

    def __call__(
        self,
        inputs: Inputs,
        adapter: str | Sequence[str] | None = None,
        *,
        context: str | Sequence[str] = (),
        settings: Settings | None = None,
    ) -> list[Reply]:
        """Predict; returns one reply per row.

        Args:
            inputs: texts, or the model's own inputs, each [batch, …]. For token classification a
                text may be a list of its words; each gets a label. For text generation also a
                conversation, a list of messages with role and content, or a list of such lists;
                the chat template renders it, and the reply is the assistant's next turn.
            adapter: names, one for all rows or one for each; `base` for none; default: the only
                adapter of an artifact that is not a bank, else the base model.
            context: for question answering, the text with the answer, for text classification the
                second text of a pair: one for all or one for each.
            settings: how to generate text.

        Raises:
            UnknownAdapterError: there is no adapter of a name.
            UsageError: `inputs` or `adapter` is of another type; the numbers of adapters or
                contexts and of rows differ; no rows; texts for an artifact without a tokenizer; a
                missing input; `context` or `settings` for another task; the process is a fork of
                the one that opened the session.
            UnavailableError: the tokenizer needs transformers, which is not installed.
            ArtifactError: a file that the model or an adapter of the request was loaded from was
                written to.
        """
        self._check_process()
        self._weights.check()
        check_inputs(inputs)
        conversations = conversations_in(inputs, self._artifact.manifest.task)
        rows = count_rows(inputs) if conversations is None else len(conversations)
        if conversations is not None:
            contexts_for(self._artifact.manifest.task, context, rows)
            self._model.check_settings(settings)
            groups = self._groups(adapter, rows, _ROWS)
            chosen = settings or Settings()
            answers = self._model.answer_conversations(conversations, groups, chosen)
        elif isinstance(inputs, Mapping):
            if context or settings is not None:
                raise UsageError("context and settings go with texts, the inputs are tensors")
            tensors = self._model.checked(inputs)
            groups = self._groups(adapter, rows, rows)
            answers = [self._model.answer_tensors(tensors, group) for group in groups]
        else:
            texts: list[Any] = [inputs] if isinstance(inputs, str) else list(inputs)
            check_texts(texts, self._artifact.manifest.task)
            self._model.check_settings(settings)
            contexts = contexts_for(self._artifact.manifest.task, context, rows)
            groups = self._groups(adapter, rows, _ROWS)
            answers = self._model.answer_texts(texts, contexts, groups, settings or Settings())
        return _in_order(groups, answers)

    def add(self, adapter: str | Path, *, allow_range: bool = False, force: bool = False) -> None:
        """Add an adapter, `NAME=DIR` or a directory, to the artifact; the next request sees it.

        Raises:
            PropulsionExportError: see `add_adapter`; nothing is changed then.
            UsageError: the session's path leads to another directory now.
        """
        place = self._place_to_change()
        self._follow(place, add_adapter(place, adapter, allow_range=allow_range, force=force))

    def remove(self, name: str) -> None:
        """Remove an adapter from the artifact; requests that began before still use it.

        Raises:
            PropulsionExportError: see `remove_adapter`; nothing is changed then.
            UsageError: the session's path leads to another directory now.
        """
        place = self._place_to_change()
        self._follow(place, remove_adapter(place, name))

    def refresh(self) -> None:
        """Read what other processes have added, replaced and removed.

        Where the session's path leads to another directory now, with the same model and perhaps
        other adapters, the session goes over to it as a whole.

        Raises:
            ArtifactError: the artifact is damaged, deleted, or another model now; the session stays
                as it was.
        """
        self._check_process()
        with self._refreshing:  # one at a time, so that an older directory never replaces a newer
            place, now = self._place, BoundDirectory(self._place.given)
            if not now.is_there():
                raise deleted(now.given)
            if now.path == place.path and place.is_there():
                self._follow(place, self._roster.artifact)
            else:
                self._go_over(now)

    def _place_to_change(self) -> BoundDirectory:
        """The session's directory, which no longer changes once its path leads to another."""
        self._check_process()
        place = self._place
        place.check_followed()
        return place

    def _check_process(self) -> None:
        """Refuse a fork, which has none of the runtime's threads, and perhaps a lock for ever."""
        refuse_fork(self._process, "session")

    def _follow(self, place: BoundDirectory, artifact: Artifact) -> None:
        """Use the adapters as they are in `place` now; `artifact` is as it was read last."""
        with self._following:  # so that an older roster never replaces a newer one
            if place is not self._place:  # another thread has gone over to another directory
                return
            roster = self._read_roster(_in(place, artifact), self._roster)
            place.check_there()
            self._roster = roster

    def _go_over(self, place: BoundDirectory) -> None:
        """Serve another directory."""
        artifact = _read(place)  # without the lock: all files are verified, which takes long
        check_same_model(self._artifact, place.path, artifact.manifest)
        with self._following:
            roster = self._read_roster(artifact, None)
            place.check_there()
            self._place, self._roster = place, roster

    def _read_roster(self, artifact: Artifact, before: Roster | None) -> Roster:
        if artifact.manifest.mode == "bank":
            assert before is None or isinstance(before, BankRoster)
            return BankRoster.read(artifact, self._put, before)
        assert before is None or isinstance(before, PackedRoster)
        return PackedRoster.read(artifact, before)

    def _groups(self, adapter: str | Sequence[str] | None, rows: int, most: int) -> Sequence[Group]:
        """The groups of rows; an unknown name is looked up on disk before it is refused."""
        roster = self._roster  # read once: another thread may replace it
        try:
            return roster.groups(_names(adapter, rows, roster), most)
        except UnknownAdapterError:
            place = self._place
            if not place.is_there():
                raise
            self._follow(place, roster.artifact)
            if self._roster is roster:
                raise
        roster = self._roster
        return roster.groups(_names(adapter, rows, roster), most)


def _in_order(groups: Sequence[Group], answers: Sequence[Sequence[Reply]]) -> list[Reply]:
    """The replies in the order of the request's rows."""
    replies = {
        row: reply
        for group, answered in zip(groups, answers, strict=True)
        for row, reply in zip(group.rows, answered, strict=True)
    }
    return [replies[row] for row in sorted(replies)]


def _open(given: Path, directory: Path, runner: str, trusted: bool) -> Session:
    artifact = replace(_read(BoundDirectory(directory)), given=given)
    return Session(artifact, runner=runner, trust_remote_code=trusted)


def _bind(artifact: Path | str | Artifact) -> BoundDirectory:
    """The directory to serve, wherever the process goes or a link leads later."""
    if isinstance(artifact, Artifact):
        return BoundDirectory(artifact.shown.absolute(), artifact.directory.absolute())
    return BoundDirectory(user_path(artifact).absolute())


def _read(place: BoundDirectory) -> Artifact:
    with shared_lock(place.path):
        read = Artifact.read(place.path, shown=place.given)
    return _in(place, read)


def _in(place: BoundDirectory, artifact: Artifact) -> Artifact:
    """The artifact, named in messages as the directory that is served: a link leads elsewhere."""
    return replace(artifact, directory=place.path, given=None)


def _names(given: str | Sequence[str] | None, rows: int, roster: Roster) -> Sequence[str]:
    if given is None:
        return one_each("adapters", roster.default, rows)
    check_names(given)
    return one_each("adapters", given, rows)
