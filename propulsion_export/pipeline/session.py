"""`Session`: an artifact that is loaded once and predicts for many, each with its adapter."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.artifact import Artifact, Tensors
from propulsion_export.decoding import recomputing
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.pipeline.adapters import add_adapter, remove_adapter
from propulsion_export.pipeline.agreeing import check_signature
from propulsion_export.pipeline.answering import Reader, open_reader
from propulsion_export.pipeline.generating import Settings, Writer, open_writer
from propulsion_export.pipeline.roster import BankRoster, Choice, Group, PackedRoster, Roster
from propulsion_export.pipeline.running import RunnerName, choose_runner, open_candidate, place_for

_ROWS = 32  # in a batch, at most: what an engine takes by default
# Outputs whose last dimension counts labels, of the tasks that have them.
_LABELLED = {"text-classification": "logits", "token-classification": "logits"}


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


class Session:
    """A loaded artifact; any number of threads may call it at the same time.

    A request computes with the adapters that there are when it begins, whatever is added, replaced
    or removed meanwhile, by this session or another.

    Args:
        artifact: a merged checkpoint, an ONNX export or an engine, or its directory.
        runner: what runs it; `auto`: what fits its kind and dtype.

    Raises:
        ArtifactError: it is damaged, or of a newer schema.
        UnavailableError: this machine cannot run it.
    """

    def __init__(self, artifact: Path | str | Artifact, *, runner: RunnerName = "auto") -> None:
        read = artifact if isinstance(artifact, Artifact) else Artifact.read(artifact)
        check_signature(read)
        name = choose_runner(read, runner)
        self._artifact = read
        self._candidate = open_candidate(read, name)
        self._text: Reader | Writer | None = None
        self._opening = threading.Lock()
        self._place = place_for(name)
        self._changing = threading.Lock()
        self._roster = self._read_roster(read)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters there are now, sorted, without `base`."""
        return self._roster.names

    def __call__(
        self,
        inputs: str | Sequence[str] | Tensors,
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
            ArtifactError: there is no adapter of a name.
            UsageError: another number of adapters or contexts than rows; no rows; texts without a
                tokenizer.
        """
        rows = _count(inputs)
        names = self._names(adapter, rows)
        groups = self._groups(names, rows if isinstance(inputs, Mapping) else _ROWS)
        if isinstance(inputs, Mapping):
            answers = [self._of_tensors(inputs, group) for group in groups]
        else:
            texts = [inputs] if isinstance(inputs, str) else list(inputs)
            contexts = one_each("contexts", context, rows) if context else ()
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
        with self._changing:
            changed = add_adapter(
                self._artifact.directory, adapter, allow_range=allow_range, force=force
            )
            self._roster = self._read_roster(changed)

    def remove(self, name: str) -> None:
        """Take an adapter out of the artifact; requests that began with it still have it.

        Raises:
            PropulsionExportError: as `remove_adapter` says; nothing has changed then.
        """
        with self._changing:
            self._roster = self._read_roster(remove_adapter(self._artifact.directory, name))

    def refresh(self) -> None:
        """See what other processes have added, replaced and removed."""
        with self._changing:
            self._roster = self._read_roster(Artifact.read(self._artifact.directory))

    def _read_roster(self, artifact: Artifact) -> Roster:
        if artifact.manifest.mode != "bank":
            return PackedRoster.read(artifact)
        before = getattr(self, "_roster", None)
        return BankRoster.read(artifact, self._place, before)

    def _names(self, given: str | Sequence[str] | None, rows: int) -> Sequence[str]:
        if given is None or isinstance(given, str):
            return [given or self._roster.default] * rows
        return one_each("adapters", given, rows)

    def _groups(self, names: Sequence[str], most: int) -> list[Group]:
        """The rows that go together; a name that is new is looked for where it may come from."""
        try:
            return self._roster.groups(names, most)
        except ArtifactError:
            before = self._roster
            self.refresh()
            if self._roster is before:
                raise
            return self._roster.groups(names, most)

    def _of_tensors(self, inputs: Tensors, group: Group) -> list[Reply]:
        run = self._candidate if callable(self._candidate) else recomputing(self._candidate)
        rows = list(group.rows)
        outputs = run({**{name: values[rows] for name, values in inputs.items()}, **group.feeds})
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
        name = _LABELLED.get(self._artifact.manifest.task, "")
        if name in outputs and choice.labels:
            outputs = {**outputs, name: outputs[name][..., : len(choice.labels)]}
        return Reply(choice.adapter, choice.version, choice.labels, outputs, prediction)


def _count(inputs: str | Sequence[str] | Tensors) -> int:
    if isinstance(inputs, str):
        return 1
    if not isinstance(inputs, Mapping):
        counts = {len(inputs)}
    else:
        counts = {len(np.atleast_1d(values)) for values in inputs.values()} or {0}
    if counts == {0}:
        raise UsageError("there are no rows, expected some")
    if len(counts) > 1:
        raise UsageError(f"the inputs have {sorted(counts)} rows, expected as many each")
    return counts.pop()


def one_each(what: str, given: str | Sequence[str], count: int) -> Sequence[str]:
    """What is given for each of `count` rows; one is for all.

    Raises:
        UsageError: it is another number.
    """
    if isinstance(given, str):
        return [given] * count
    if len(given) not in (1, count):
        raise UsageError(f"{len(given)} {what} for {count} rows, expected one, or one each")
    return given if len(given) == count else [given[0]] * count
