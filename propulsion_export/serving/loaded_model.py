"""A loaded artifact's model: inputs and adapters of a request in, one reply per row out."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, PACKED_INPUTS
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.generation_settings import GenerationSettings
from propulsion_export.base_model.model_inputs import extra_inputs
from propulsion_export.base_model.positions import as_config
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.words import joined
from propulsion_export.data.messages import Conversation
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import PropulsionExportError, UsageError
from propulsion_export.runners.decoding import recomputing
from propulsion_export.runners.opening import open_candidate
from propulsion_export.serving.finite import are_lost
from propulsion_export.serving.generation import Prompt, Settings, Writer, open_writer
from propulsion_export.serving.requests import Text, as_given
from propulsion_export.serving.roster import Choice, Group
from propulsion_export.serving.sides import check_sides, run_by_side
from propulsion_export.serving.texts import Reader, TextRow, open_reader


@dataclass(frozen=True)
class Reply:
    """The outputs and the prediction for one row.

    Attributes:
        adapter: the name of the row's adapter; `base` for none.
        version: digest of the adapter that was used; replacing an adapter changes it.
        labels: class names, as many as there are logits; None if there are none.
        outputs: the row's outputs by name, without the batch axis; empty for generated text.
        prediction: the prediction for a text, as `run` prints it; None for tensors, and where
            `has_nan`, unless it is generated text.
        of_tokens: whether the outputs are scores of tokens, which minus infinity rules out.
    """

    adapter: str
    version: str
    labels: tuple[str, ...] | None = None
    outputs: Tensors = field(default_factory=dict)
    prediction: Mapping[str, Any] | None = None
    of_tokens: bool = False

    @cached_property
    def has_nan(self) -> bool:
        """Whether an output is NaN or infinite: there is no prediction then.

        Generated text stops there, and `prediction["stopped"]` is `nan`.
        """
        stopped = self.prediction is not None and self.prediction.get("stopped") == "nan"
        return stopped or are_lost(self.outputs, of_tokens=self.of_tokens)


class LoadedModel:
    """A model in its runtime; any number of threads may use it at the same time.

    All that it ever needs of the artifact's files is read now. What keeps it from reading texts is
    raised by the first text, because tensors need no tokenizer.

    Args:
        artifact: a checked artifact.
        runner: the runtime, never `auto`.
        trust_remote_code: run code that a merged checkpoint brings.

    Raises:
        ArtifactError: a configuration file is damaged.
        UnavailableError: this machine cannot run it.
    """

    def __init__(self, artifact: Artifact, runner: str, *, trust_remote_code: bool) -> None:
        self._artifact = artifact
        self._config = read_settings(artifact.directory)
        self._extras = {extra.name: extra for extra in extra_inputs(as_config(self._config))}
        self._candidate = open_candidate(artifact, runner, trust_remote_code=trust_remote_code)
        self._not_applied: dict[str, Any] = {}
        if not callable(self._candidate):
            self._not_applied = GenerationSettings.read(artifact.directory).not_applied()
        self._text: Reader | Writer | Exception
        try:
            self._text = self._open_text()
        except (PropulsionExportError, ImportError) as error:
            self._text = error.with_traceback(None)

    def settings_not_applied(self) -> dict[str, Any]:
        """See `Session.settings_not_applied`."""
        return dict(self._not_applied)

    def checked(self, inputs: Tensors) -> Tensors:
        """The model's own inputs as it takes them.

        Raises:
            UsageError: naming what is missing, unknown or of other dimensions or types, or rows
                that cannot be computed together.
        """
        tensors = self._as_taken(inputs)
        check_sides(self._config, tensors, generates=not callable(self._candidate))
        return tensors

    def _as_taken(self, inputs: Tensors) -> Tensors:
        specs = self._artifact.manifest.inputs
        extras = self._extras
        if not callable(self._candidate):  # a generator makes the others itself
            return as_given(inputs, {"input_ids", "attention_mask"}, {"decoder_input_ids"})
        if not specs:  # a merged checkpoint
            needed = {"input_ids", *extras}
            return as_given(inputs, needed, {"attention_mask", "token_type_ids"}, extras)
        names = {spec.name for spec in specs} - {*PACKED_INPUTS, BANK_INPUT, IDS_INPUT}
        return as_given(inputs, names, set(), extras)

    def check_settings(self, settings: Settings | None) -> None:
        """Refuse what is no settings, and settings where the model generates no text.

        Raises:
            UsageError: one of these.
        """
        if settings is not None and callable(self._candidate):
            task = self._artifact.manifest.task
            raise UsageError(f"settings: are for generating text, the artifact is for {task}")
        if not isinstance(settings, Settings | None):
            raise UsageError(f"settings: is {type(settings).__name__}, expected Settings")

    def answer_tensors(self, inputs: Tensors, group: Group) -> list[Reply]:
        """Answer the rows of a group, given the model's inputs of all rows of the request."""
        run = self._candidate if callable(self._candidate) else recomputing(self._candidate)
        rows = list(group.rows)
        own = {name: values[rows] for name, values in inputs.items()}
        outputs = run_by_side(run, own, group.feeds, rope_switches(self._config))
        return [
            self._reply(choice, {name: values[row] for name, values in outputs.items()})
            for row, choice in enumerate(group.choices)
        ]

    def answer_texts(
        self,
        texts: Sequence[Text],
        contexts: Sequence[str],
        groups: Sequence[Group],
        settings: Settings,
    ) -> list[list[Reply]]:
        """Answer texts: for each group the replies to its rows.

        Raises:
            UsageError: there is no tokenizer, or a text cannot be a prompt.
            UnavailableError: the tokenizer needs a package that is not installed.
        """
        text = self._opened_text()
        if isinstance(text, Reader):
            return [self._read(text, texts, contexts, group) for group in groups]
        # All are encoded first: one that cannot be a prompt is refused before any is answered.
        prompts = {row: text.encode(joined(one), row) for row, one in enumerate(texts)}
        return [self._write(text, prompts, group, settings) for group in groups]

    def answer_conversations(
        self,
        conversations: Sequence[Conversation],
        groups: Sequence[Group],
        settings: Settings,
    ) -> list[list[Reply]]:
        """Answer conversations: for each group the replies to its rows.

        Raises:
            UsageError: see `Writer.encode_chat`; or there is no tokenizer.
            UnavailableError: the tokenizer or jinja2 needs a package that is not installed.
        """
        writer = self._opened_text()
        assert isinstance(writer, Writer)  # `conversations_in` has checked the task
        prompts = {
            row: writer.encode_chat(conversations[row], row, choice.chat_template)
            for group in groups
            for row, choice in zip(group.rows, group.choices, strict=True)
        }
        return [self._write(writer, prompts, group, settings) for group in groups]

    def _read(
        self, reader: Reader, texts: Sequence[Text], contexts: Sequence[str], group: Group
    ) -> list[Reply]:
        rows = [
            TextRow(
                texts[row], contexts[row] if contexts else None, choice.labels, choice.problem_type
            )
            for row, choice in zip(group.rows, group.choices, strict=True)
        ]
        answers = reader.read(rows, group.feeds)
        return [
            self._reply(choice, answer.outputs, answer.prediction)
            for choice, answer in zip(group.choices, answers, strict=True)
        ]

    def _write(
        self, writer: Writer, prompts: Mapping[int, Prompt], group: Group, settings: Settings
    ) -> list[Reply]:
        own = [prompts[row] for row in group.rows]
        written = writer.write(own, group.rows, group.feeds, settings)
        return [
            Reply(choice.adapter, choice.version, prediction=prediction)
            for choice, prediction in zip(group.choices, written, strict=True)
        ]

    def _open_text(self) -> Reader | Writer:
        if callable(self._candidate):
            return open_reader(self._artifact, self._candidate)
        return open_writer(self._artifact, self._candidate)

    def _opened_text(self) -> Reader | Writer:
        if isinstance(self._text, Exception):
            raise copy(self._text) from self._text  # threads may raise it at the same time
        return self._text

    def _reply(
        self, choice: Choice, outputs: Tensors, prediction: Mapping[str, Any] | None = None
    ) -> Reply:
        """A reply whose logits are cut to the labels of the row's adapter; others may have more."""
        task = TASKS[self._artifact.manifest.task]
        name = task.labelled_output
        if name is not None and name in outputs and choice.labels:
            outputs = {**outputs, name: outputs[name][..., : len(choice.labels)]}
        of_tokens = task.prediction in ("text", "filled masks")
        reply = Reply(choice.adapter, choice.version, choice.labels, outputs, prediction, of_tokens)
        lost = prediction is not None and reply.has_nan
        return replace(reply, prediction=None) if lost else reply
