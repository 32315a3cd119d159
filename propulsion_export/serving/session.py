"""`Session`: an artifact loaded once that answers many requests, each row with its adapter."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from propulsion_export.artifacts.artifact import Artifact
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
)

_ROWS = 32  # most rows of a batch: what an engine takes by default


class Session:
    """A loaded artifact; any number of threads may call it at the same time.

    A request uses the adapters that there are when it begins, whatever is added, replaced or
    removed meanwhile. The next request sees what this session changed. A new name that another
    process added is found when a request names it; all other changes by others are seen after
    `refresh`.

    A session belongs to the process that opened it, because a fork has none of a runtime's
    threads. Unpickling a session opens the same artifact again.

    Args:
        artifact: a merged checkpoint, an ONNX export or an engine, or its directory.
        runner: the runtime; `auto`: the default for its kind and dtype.
        trust_remote_code: run code that a merged checkpoint brings; a graph needs none.

    Raises:
        ArtifactError: it is damaged, of a newer schema, or its manifest contradicts itself or
            the graph.
        UnavailableError: this machine cannot run it.
    """

    def __init__(
        self,
        artifact: Path | str | Artifact,
        *,
        runner: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        read = artifact if isinstance(artifact, Artifact) else _read(_bound(artifact))
        read = replace(read, directory=_bound(read.directory))
        check_consistent(read.directory, read.manifest)
        self._artifact = read
        self._runner = choose_runner(read, runner)
        self._trusted = trust_remote_code
        self._model = LoadedModel(read, self._runner, trust_remote_code=trust_remote_code)
        self._place = place_for(self._runner)
        self._following = threading.Lock()
        self._process = os.getpid()
        self._roster = self._read_roster(read, None)

    def __repr__(self) -> str:
        return (
            f"<Session of {self._artifact.directory}: {self._artifact.manifest.task}, "
            f"{self._runner}, {len(self.adapters)} adapters>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self._artifact.directory, self._runner, self._trusted)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters there are now, sorted, without `base`."""
        return self._roster.names

    @property
    def settings_not_applied(self) -> dict[str, Any]:
        """Settings for generating text in the artifact's files that would change it, by name.

        Those of other searches than token by token, and where `do_sample` is on those of sampling:
        pass `Settings(sampling=...)` to sample. Empty for other tasks.

        Raises:
            ArtifactError: the settings are damaged.
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
            UsageError: `adapter` is no name or list of names; the numbers of adapters or contexts
                and of rows differ; no rows; texts for an artifact without a tokenizer; a missing
                input; `context` or `settings` for another task; the process is a fork of the one
                that opened the session.
            UnavailableError: the tokenizer needs transformers, which is not installed.
        """
        self._check_process()
        conversations = conversations_in(inputs, self._artifact.manifest.task)
        rows = count_rows(inputs) if conversations is None else len(conversations)
        if conversations is not None:
            contexts_for(self._artifact.manifest.task, context, rows)
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
        """
        self._check_process()
        directory = self._artifact.directory
        self._follow(add_adapter(directory, adapter, allow_range=allow_range, force=force))

    def remove(self, name: str) -> None:
        """Remove an adapter from the artifact; requests that began before still use it.

        Raises:
            PropulsionExportError: see `remove_adapter`; nothing is changed then.
        """
        self._check_process()
        self._follow(remove_adapter(self._artifact.directory, name))

    def refresh(self) -> None:
        """Read what other processes have added, replaced and removed.

        Raises:
            ArtifactError: the artifact is damaged, or holds another model now; the session stays
                as it was.
        """
        self._check_process()
        self._follow(self._roster.artifact)

    def _check_process(self) -> None:
        """Refuse a fork, which has none of the runtime's threads, and perhaps a lock for ever."""
        refuse_fork(self._process, "session")

    def _follow(self, artifact: Artifact) -> None:
        """Use the adapters as they are on disk now; `artifact` is as it was read last."""
        with self._following:  # so that an older roster never replaces a newer one
            self._roster = self._read_roster(artifact, self._roster)

    def _read_roster(self, artifact: Artifact, before: Roster | None) -> Roster:
        if artifact.manifest.mode == "bank":
            assert before is None or isinstance(before, BankRoster)
            return BankRoster.read(artifact, self._place, before)
        assert before is None or isinstance(before, PackedRoster)
        return PackedRoster.read(artifact, before)

    def _groups(self, adapter: str | Sequence[str] | None, rows: int, most: int) -> Sequence[Group]:
        """The groups of rows; an unknown name is looked up on disk before it is refused."""
        roster = self._roster  # read once: another thread may replace it
        try:
            return roster.groups(_names(adapter, rows, roster), most)
        except UnknownAdapterError:
            self.refresh()
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


def _open(directory: Path, runner: str, trusted: bool) -> Session:
    return Session(directory, runner=runner, trust_remote_code=trusted)


def _bound(directory: Path | str) -> Path:
    """The directory that a path leads to now, wherever the process goes or a link leads later."""
    return Path(os.path.realpath(user_path(directory)))


def _read(directory: Path) -> Artifact:
    with shared_lock(directory):
        return Artifact.read(directory)


def _names(given: str | Sequence[str] | None, rows: int, roster: Roster) -> Sequence[str]:
    if given is None:
        return one_each("adapters", roster.default, rows)
    check_names(given)
    return one_each("adapters", given, rows)
