"""`Session`: an artifact that is loaded once and predicts for many, each with its adapter."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.locking import shared_lock
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, PACKED_INPUTS
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import UnknownAdapterError, UsageError
from propulsion_export.graph.signature import check_signature
from propulsion_export.runners.decoding import recomputing
from propulsion_export.runners.opening import choose_runner, open_candidate, place_for
from propulsion_export.serving.generation import Settings, Writer, open_writer
from propulsion_export.serving.requests import (
    Inputs,
    as_given,
    check_texts,
    contexts_for,
    count_rows,
    one_each,
)
from propulsion_export.serving.roster import (
    BankRoster,
    Choice,
    Group,
    PackedRoster,
    Roster,
)
from propulsion_export.serving.texts import Reader, open_reader

_ROWS = 32  # in a batch, at most: what an engine takes by default


@dataclass(frozen=True)
class Reply:
    """What an artifact says of one row.

    Attributes:
        adapter: whose it is, `base` for none.
        version: digest of the adapter that was computed with; a name can have had others.
        labels: class names, as many as there are logits; None when nobody named them.
        outputs: of the row, by name, without the axis of the batch; empty of text generation.
        prediction: of a text, as `run` tells it; None of tensors.
    """

    adapter: str
    version: str
    labels: tuple[str, ...] | None = None
    outputs: Tensors = field(default_factory=dict)
    prediction: Mapping[str, Any] | None = None

    @property
    def has_nan(self) -> bool:
        """Whether an output is no number, so that the prediction means nothing."""
        return any(np.isnan(values).any() for values in self.outputs.values())


class Session:
    """A loaded artifact; any number of threads may call it at the same time.

    A request computes with the adapters that there are when it begins, whatever is added, replaced
    or removed meanwhile. What this session changes is seen by the next request. Of what others
    change, a new name is seen when it is asked for, all else after `refresh`.

    It belongs to the process that opened it, because a fork has no threads of a runtime. A pickled
    one opens the same artifact again.

    Args:
        artifact: a merged checkpoint, an ONNX export or an engine, or its directory.
        runner: what runs it; `auto`: what fits its kind and dtype.

    Raises:
        ArtifactError: it is damaged, or of a newer schema.
        UnavailableError: this machine cannot run it.
    """

    def __init__(self, artifact: Path | str | Artifact, *, runner: str = "auto") -> None:
        read = artifact if isinstance(artifact, Artifact) else _read(Path(artifact).expanduser())
        read = replace(read, directory=read.directory.absolute())  # wherever the process goes
        check_signature(read)
        self._artifact = read
        self._runner = choose_runner(read, runner)
        self._candidate = open_candidate(read, self._runner)
        self._text: Reader | Writer | None = None
        self._opening = threading.Lock()
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
        return _open, (self._artifact.directory, self._runner)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters there are now, sorted, without `base`."""
        return self._roster.names

    def __call__(
        self,
        inputs: Inputs,
        adapter: str | Sequence[str] | None = None,
        *,
        context: str | Sequence[str] = (),
        settings: Settings | None = None,
    ) -> list[Reply]:
        """Predict; one reply a row.

        Args:
            inputs: texts; or the model's own inputs, [batch, …] each.
            adapter: names, one for all rows or one for each, `base` for none; default: the only
                adapter of an artifact that is no bank, or the base model.
            context: where the answers to questions stand, one for all or one for each.
            settings: how to generate text.

        Raises:
            UnknownAdapterError: there is no adapter of a name.
            UsageError: another number of adapters or contexts than rows; no rows; texts without a
                tokenizer; an input that the model needs is missing; `context` or `settings` for
                another task; the process is a fork of the one that opened the session.
        """
        if os.getpid() != self._process:
            raise UsageError(
                "the session was opened before this process was forked, expected one of its own",
                remedy="Open a session in each process.",
            )
        rows = count_rows(inputs)
        if isinstance(inputs, Mapping):
            tensors = self._tensors(inputs, context, settings)
            groups = self._groups(adapter, rows, rows)
            answers = [self._of_tensors(tensors, group) for group in groups]
        else:
            texts = [inputs] if isinstance(inputs, str) else list(inputs)
            check_texts(texts)
            self._check_settings(settings)
            contexts = contexts_for(self._artifact.manifest.task, context, rows)
            groups = self._groups(adapter, rows, _ROWS)
            answers = self._of_texts(texts, contexts, groups, settings or Settings())
        replies = {
            row: reply
            for group, told in zip(groups, answers, strict=True)
            for row, reply in zip(group.rows, told, strict=True)
        }
        return [replies[row] for row in range(rows)]

    def add(self, adapter: str | Path, *, allow_range: bool = False, force: bool = False) -> None:
        """Add an adapter, `NAME=DIR` or a directory, to the artifact; requests see it at once.

        Raises:
            PropulsionExportError: as `add_adapter` says; nothing has changed then.
        """
        directory = self._artifact.directory
        self._follow(add_adapter(directory, adapter, allow_range=allow_range, force=force))

    def remove(self, name: str) -> None:
        """Take an adapter out of the artifact; requests that began with it still have it.

        Raises:
            PropulsionExportError: as `remove_adapter` says; nothing has changed then.
        """
        self._follow(remove_adapter(self._artifact.directory, name))

    def refresh(self) -> None:
        """See what others have added, replaced and removed.

        Raises:
            ArtifactError: it is damaged, or another model by now; the session stays as it was.
        """
        self._follow(self._roster.artifact)

    def _follow(self, artifact: Artifact) -> None:
        """Go on with the adapters of now; `artifact` is as it was read last."""
        with self._following:  # of two looks at it the later counts
            self._roster = self._read_roster(artifact, self._roster)

    def _read_roster(self, artifact: Artifact, before: Roster | None) -> Roster:
        if artifact.manifest.mode == "bank":
            assert before is None or isinstance(before, BankRoster)
            return BankRoster.read(artifact, self._place, before)
        assert before is None or isinstance(before, PackedRoster)
        return PackedRoster.read(artifact, before)

    def _groups(self, adapter: str | Sequence[str] | None, rows: int, most: int) -> Sequence[Group]:
        """The rows that go together; a name that is new is looked for where it may come from."""
        roster = self._roster  # once: the next look may find another
        try:
            return roster.groups(_names(adapter, rows, roster), most)
        except UnknownAdapterError:
            self.refresh()
            if self._roster is roster:
                raise
        roster = self._roster
        return roster.groups(_names(adapter, rows, roster), most)

    def _tensors(
        self, inputs: Tensors, context: str | Sequence[str], settings: Settings | None
    ) -> Tensors:
        if context or settings is not None:
            raise UsageError("context and settings go with texts, the inputs are tensors")
        told = self._artifact.manifest.inputs
        if not callable(self._candidate):  # a generator makes the others itself
            return as_given(inputs, {"input_ids", "attention_mask"}, {"decoder_input_ids"})
        if not told:  # a merged checkpoint
            return as_given(inputs, {"input_ids"}, {"attention_mask", "token_type_ids"})
        names = {spec.name for spec in told} - {*PACKED_INPUTS, BANK_INPUT, IDS_INPUT}
        return as_given(inputs, names, set())

    def _check_settings(self, settings: Settings | None) -> None:
        if settings is not None and callable(self._candidate):
            task = self._artifact.manifest.task
            raise UsageError(f"settings: are of generating text, the artifact is for {task}")

    def _of_tensors(self, inputs: Tensors, group: Group) -> list[Reply]:
        run = self._candidate if callable(self._candidate) else recomputing(self._candidate)
        rows = list(group.rows)
        own = {name: values[rows] for name, values in inputs.items()}
        outputs = run({**own, **group.feeds})
        return [
            self._reply(choice, {name: values[row] for name, values in outputs.items()})
            for row, choice in enumerate(group.choices)
        ]

    def _of_texts(
        self,
        texts: Sequence[str],
        contexts: Sequence[str],
        groups: Sequence[Group],
        settings: Settings,
    ) -> list[list[Reply]]:
        text = self._open_text()
        if isinstance(text, Reader):
            return [self._read(text, texts, contexts, group) for group in groups]
        # One that cannot be a prompt is told now, not behind what was generated for others.
        prompts = [text.encode(one, row) for row, one in enumerate(texts)]
        return [self._write(text, prompts, group, settings) for group in groups]

    def _read(
        self, reader: Reader, texts: Sequence[str], contexts: Sequence[str], group: Group
    ) -> list[Reply]:
        beside = [contexts[row] for row in group.rows if contexts]
        labels = [choice.labels for choice in group.choices]
        answers = reader.read([texts[row] for row in group.rows], beside, group.feeds, labels)
        return [
            self._reply(choice, answer.outputs, answer.described)
            for choice, answer in zip(group.choices, answers, strict=True)
        ]

    def _write(
        self, writer: Writer, prompts: Sequence[Sequence[int]], group: Group, settings: Settings
    ) -> list[Reply]:
        own = [prompts[row] for row in group.rows]
        written = writer.write(own, group.rows, group.feeds, settings)
        return [
            Reply(choice.adapter, choice.version, prediction=told)
            for choice, told in zip(group.choices, written, strict=True)
        ]

    def _open_text(self) -> Reader | Writer:
        """What reads texts; only tensors need no tokenizer."""
        with self._opening:
            if self._text is None:
                model = self._candidate
                artifact = self._artifact
                self._text = (
                    open_reader(artifact, model)
                    if callable(model)
                    else open_writer(artifact, model)
                )
            return self._text

    def _reply(
        self, choice: Choice, outputs: Tensors, prediction: Mapping[str, Any] | None = None
    ) -> Reply:
        """With logits cut to the labels of the row's adapter: the rest is room for others'."""
        name = TASKS[self._artifact.manifest.task].labelled_output
        if name is not None and name in outputs and choice.labels:
            outputs = {**outputs, name: outputs[name][..., : len(choice.labels)]}
        return Reply(choice.adapter, choice.version, choice.labels, outputs, prediction)


def _open(directory: Path, runner: str) -> Session:
    return Session(directory, runner=runner)


def _read(directory: Path) -> Artifact:
    with shared_lock(directory):
        return Artifact.read(directory)


def _names(given: str | Sequence[str] | None, rows: int, roster: Roster) -> Sequence[str]:
    return one_each("adapters", roster.default if given is None else given, rows)
