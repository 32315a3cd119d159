"""`Session`: an artifact loaded once that answers many requests, each row with its adapter."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.consistency import check_consistent
from propulsion_export.artifacts.locking import shared_lock
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, PACKED_INPUTS
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.generation_settings import GenerationSettings
from propulsion_export.base_model.model_inputs import extra_inputs
from propulsion_export.base_model.positions import as_config
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.words import joined
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import UnknownAdapterError, UsageError
from propulsion_export.runners.decoding import recomputing
from propulsion_export.runners.opening import choose_runner, open_candidate, place_for
from propulsion_export.serving.generation import Settings, Writer, open_writer
from propulsion_export.serving.requests import (
    Inputs,
    Text,
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
from propulsion_export.serving.sides import check_sides, run_by_side
from propulsion_export.serving.texts import Reader, open_reader

_ROWS = 32  # most rows of a batch: what an engine takes by default


@dataclass(frozen=True)
class Reply:
    """The outputs and the prediction for one row.

    Attributes:
        adapter: the name of the row's adapter; `base` for none.
        version: digest of the adapter that was used; replacing an adapter changes it.
        labels: class names, as many as there are logits; None if there are none.
        outputs: the row's outputs by name, without the batch axis; empty for generated text.
        prediction: the prediction for a text, as `run` prints it; None for tensors.
    """

    adapter: str
    version: str
    labels: tuple[str, ...] | None = None
    outputs: Tensors = field(default_factory=dict)
    prediction: Mapping[str, Any] | None = None

    @property
    def has_nan(self) -> bool:
        """Whether an output is NaN or overflows to infinity: the prediction is meaningless.

        Generated text stops there, and `prediction["stopped"]` is `nan`.
        """
        lost = self.prediction is not None and self.prediction.get("stopped") == "nan"
        return lost or any(_is_lost(values) for values in self.outputs.values())


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
        self._config = read_settings(read.directory)
        self._runner = choose_runner(read, runner)
        extras = extra_inputs(as_config(self._config))
        self._extras = {extra.name: extra for extra in extras}
        self._trusted = trust_remote_code
        self._candidate = open_candidate(read, self._runner, trust_remote_code=trust_remote_code)
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
        if callable(self._candidate):
            return {}
        return GenerationSettings.read(self._artifact.directory).not_applied()

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
                text may be a list of its words; each gets a label.
            adapter: names, one for all rows or one for each; `base` for none; default: the only
                adapter of an artifact that is not a bank, else the base model.
            context: for question answering, the text with the answer, for text classification the
                second text of a pair: one for all or one for each.
            settings: how to generate text.

        Raises:
            UnknownAdapterError: there is no adapter of a name.
            UsageError: the numbers of adapters or contexts and of rows differ; no rows; texts for
                an artifact without a tokenizer; a missing input; `context` or `settings` for
                another task; the process is a fork of the one that opened the session.
            UnavailableError: the tokenizer needs transformers, which is not installed.
        """
        self._check_process()
        rows = count_rows(inputs)
        if isinstance(inputs, Mapping):
            tensors = self._tensors(inputs, context, settings)
            check_sides(self._config, tensors, generates=not callable(self._candidate))
            groups = self._groups(adapter, rows, rows)
            answers = [self._of_tensors(tensors, group) for group in groups]
        else:
            texts = [inputs] if isinstance(inputs, str) else list(inputs)
            check_texts(texts, self._artifact.manifest.task)
            self._check_settings(settings)
            contexts = contexts_for(self._artifact.manifest.task, context, rows)
            groups = self._groups(adapter, rows, _ROWS)
            answers = self._of_texts(texts, contexts, groups, settings or Settings())
        replies = {
            row: reply
            for group, answered in zip(groups, answers, strict=True)
            for row, reply in zip(group.rows, answered, strict=True)
        }
        return [replies[row] for row in range(rows)]

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
        if os.getpid() != self._process:
            raise UsageError(
                "the session was opened before this process was forked, expected one of its own",
                remedy="Open a session in each process.",
            )

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

    def _tensors(
        self, inputs: Tensors, context: str | Sequence[str], settings: Settings | None
    ) -> Tensors:
        if context or settings is not None:
            raise UsageError("context and settings go with texts, the inputs are tensors")
        specs = self._artifact.manifest.inputs
        extras = self._extras
        if not callable(self._candidate):  # a generator makes the others itself
            return as_given(inputs, {"input_ids", "attention_mask"}, {"decoder_input_ids"})
        if not specs:  # a merged checkpoint
            needed = {"input_ids", *extras}
            return as_given(inputs, needed, {"attention_mask", "token_type_ids"}, extras)
        names = {spec.name for spec in specs} - {*PACKED_INPUTS, BANK_INPUT, IDS_INPUT}
        return as_given(inputs, names, set(), extras)

    def _check_settings(self, settings: Settings | None) -> None:
        if settings is not None and callable(self._candidate):
            task = self._artifact.manifest.task
            raise UsageError(f"settings: are for generating text, the artifact is for {task}")

    def _of_tensors(self, inputs: Tensors, group: Group) -> list[Reply]:
        run = self._candidate if callable(self._candidate) else recomputing(self._candidate)
        rows = list(group.rows)
        own = {name: values[rows] for name, values in inputs.items()}
        outputs = run_by_side(run, own, group.feeds, rope_switches(self._config))
        return [
            self._reply(choice, {name: values[row] for name, values in outputs.items()})
            for row, choice in enumerate(group.choices)
        ]

    def _of_texts(
        self,
        texts: Sequence[Text],
        contexts: Sequence[str],
        groups: Sequence[Group],
        settings: Settings,
    ) -> list[list[Reply]]:
        text = self._open_text()
        if isinstance(text, Reader):
            return [self._read(text, texts, contexts, group) for group in groups]
        # All are encoded first: one that cannot be a prompt is refused before any is answered.
        prompts = [text.encode(joined(one), row) for row, one in enumerate(texts)]
        return [self._write(text, prompts, group, settings) for group in groups]

    def _read(
        self, reader: Reader, texts: Sequence[Text], contexts: Sequence[str], group: Group
    ) -> list[Reply]:
        beside = [contexts[row] for row in group.rows if contexts]
        labels = [choice.labels for choice in group.choices]
        kinds = [choice.problem_type for choice in group.choices]
        own = [texts[row] for row in group.rows]
        answers = reader.read(own, beside, group.feeds, labels, kinds)
        return [
            self._reply(choice, answer.outputs, answer.prediction)
            for choice, answer in zip(group.choices, answers, strict=True)
        ]

    def _write(
        self, writer: Writer, prompts: Sequence[Sequence[int]], group: Group, settings: Settings
    ) -> list[Reply]:
        own = [prompts[row] for row in group.rows]
        written = writer.write(own, group.rows, group.feeds, settings)
        return [
            Reply(choice.adapter, choice.version, prediction=prediction)
            for choice, prediction in zip(group.choices, written, strict=True)
        ]

    def _open_text(self) -> Reader | Writer:
        """The reader or writer, opened when the first text comes: tensors need no tokenizer."""
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
        """A reply whose logits are cut to the labels of the row's adapter; others may have more."""
        name = TASKS[self._artifact.manifest.task].labelled_output
        if name is not None and name in outputs and choice.labels:
            outputs = {**outputs, name: outputs[name][..., : len(choice.labels)]}
        return Reply(choice.adapter, choice.version, choice.labels, outputs, prediction)


def _is_lost(values: Any) -> bool:
    """Whether numbers are NaN, or infinite above; masks are infinite below."""
    return bool((np.isnan(values) | np.isposinf(values)).any())


def _open(directory: Path, runner: str, trusted: bool) -> Session:
    return Session(directory, runner=runner, trust_remote_code=trusted)


def _bound(directory: Path | str) -> Path:
    """The directory that a path leads to now, wherever the process goes or a link leads later."""
    return Path(os.path.realpath(user_path(directory)))


def _read(directory: Path) -> Artifact:
    with shared_lock(directory):
        return Artifact.read(directory)


def _names(given: str | Sequence[str] | None, rows: int, roster: Roster) -> Sequence[str]:
    return one_each("adapters", roster.default if given is None else given, rows)
