"""The files of an artifact that say how texts are read: tokenizer, pooling, generation settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from propulsion_export.adapters.own_template import own_templates
from propulsion_export.adapters.own_tokenizer import tokenizer_source
from propulsion_export.adapters.sentence_source import sentence_source
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.base_model.chat.templates import (
    choose_template,
    read_template,
    template_in,
    write_template,
)
from propulsion_export.base_model.config import save_generation_settings
from propulsion_export.base_model.sentences.modules import copy_sentence_pipeline
from propulsion_export.base_model.settings import Settings, write_tokenizer_settings
from propulsion_export.base_model.tokenizer.reading import copy_tokenizer, tokenizer_to_record
from propulsion_export.base_model.tokenizer.recorded import record_tokenizer
from propulsion_export.base_model.tokenizer.token_ids import check_token_ids
from propulsion_export.errors import AdapterError, BaseModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class TextFiles:
    """Where the files come from: the base model, or an adapter that brings its own.

    Attributes:
        base: path or name of the base model.
        task: one of `TASKS`.
        tokenizer_source: path or name of what the tokenizer is read from.
        tokenizer: as transformers loads it; None where it cannot be loaded here, or there is none.
        sentence_source: path or name of what the sentence pipeline is read from; None without one.
        trust_remote_code: whether a tokenizer's own code may run.
        template: the base model's chat template; None without one.
        own_templates: the chat templates that adapters were trained with, by name.
    """

    base: str
    task: str
    tokenizer_source: str
    tokenizer: Any | None
    sentence_source: str | None
    trust_remote_code: bool
    template: str | None = None
    own_templates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(
        cls, base: str, task: str, adapters: Mapping[str, str], *, trust_remote_code: bool
    ) -> Self:
        """Find and read them.

        Args:
            base: path or name of the base model.
            task: one of `TASKS`.
            adapters: the adapters' directories by name.
            trust_remote_code: run a tokenizer's own code.

        Raises:
            AdapterError: the adapters need different tokenizers or sentence pipelines.
            BaseModelError: a tokenizer or sentence pipeline cannot be read.
        """
        directories = {name: Path(each) for name, each in adapters.items()}
        source = tokenizer_source(directories, base)
        tokenizer = tokenizer_to_record(source, trust_remote_code=trust_remote_code)
        loaded = tokenizer if source == base else None
        return cls(
            base=base,
            task=task,
            tokenizer_source=source,
            tokenizer=tokenizer,
            sentence_source=sentence_source(base, task, list(adapters.values())),
            trust_remote_code=trust_remote_code,
            template=template_in(base)
            or choose_template(getattr(loaded, "chat_template", None), with_tools=False),
            own_templates=own_templates(directories),
        )

    def template_for(self, mode: Mode) -> str | None:
        """The chat template of an artifact: that of the adapter folded in, else the base model's.

        Where the base model has none, or the tokenizer is an adapter's, it is the first adapter's.
        """
        own = next(iter(self.own_templates.values()), None)
        replaced = mode == "folded" or self.tokenizer_source != self.base
        return (own or self.template) if replaced else (self.template or own)

    def template_of(self, adapter: str, mode: Mode) -> str | None:
        """The chat template to record for an adapter; None where it is the artifact's."""
        own = self.own_templates.get(adapter)
        return None if own == self.template_for(mode) else own

    def check_tokens(self, config: "PretrainedConfig") -> None:
        """Refuse a tokenizer with tokens beyond the model's embedding.

        Raises:
            AdapterError: an adapter's tokenizer has such tokens.
            BaseModelError: the base model's tokenizer has.
        """
        if self.tokenizer is None:
            return
        error = BaseModelError if self.tokenizer_source == self.base else AdapterError
        check_token_ids(self.tokenizer_source, self.tokenizer, config.to_dict(), error)

    def write(self, directory: Path, settings: Settings, mode: Mode = "folded") -> None:
        """Copy them into an artifact's directory, with the settings that differ from the files."""
        copy_tokenizer(self.tokenizer_source, directory)
        write_tokenizer_settings(directory, settings)
        if self.sentence_source is not None:
            copy_sentence_pipeline(self.sentence_source, directory)
        save_generation_settings(self.base, self.task, directory)
        template = self.template_for(mode)  # last: the others copy the base model's
        if template is not None and template != read_template(directory):
            write_template(directory, template)

    def record(self, directory: Path, settings: Settings) -> None:
        """Record the tokenizer for serving without transformers, in a directory written before."""
        tokenizer = self.tokenizer
        # The settings, and the class that config.json names, may make it another one.
        if settings.tokenizer or self.tokenizer_source != self.base:
            trust = self.trust_remote_code
            tokenizer = tokenizer_to_record(str(directory), trust_remote_code=trust)
        record_tokenizer(tokenizer, directory)
