"""What an artifact says otherwise than its base model's own config.json and tokenizer files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.settings import problem_type_of, settings_in_use
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.base_model.settings import (
    SINGLE_LABEL,
    ProblemType,
    Settings,
    problem_type_in,
    set_in_config_,
    with_prefix_space,
)
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.pipeline.text_files import TextFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Settled:
    """What was decided for an artifact.

    Attributes:
        settings: those of config.json are set in the model; those of the tokenizer are for the
            files of the artifact.
        base: what the logits of the base model mean in the artifact.
        adapters: what those of each adapter mean, in the order given.
    """

    settings: Settings
    base: ProblemType | None = None
    adapters: tuple[ProblemType | None, ...] = ()

    @property
    def note(self) -> str:
        """The settings for a progress message, such as `, with pad_token_id 3`; may be empty."""
        changed = {**self.settings.model, **self.settings.tokenizer}
        shown = ", ".join(f"{name} {value!r}" for name, value in changed.items())
        return f", with {shown}" if shown else ""


def settle_(
    model: "PreTrainedModel",
    adapters: Sequence[Adapter],
    texts: TextFiles,
    *,
    mode: Mode = "folded",
    own_head: bool = True,
) -> Settled:
    """Set in a model's configuration what its adapters were trained with and what batches need.

    Args:
        model: the base model for the task; its weights are not read.
        adapters: those of the artifact; may be none.
        texts: the artifact's tokenizer, whose padding token is set.
        mode: how the artifact holds its adapters.
        own_head: whether the base model has its own head in the artifact.

    Raises:
        AdapterError: the settings contradict each other or the tokenizer.
        BaseModelError: the model needs a padding token and none can be it.
    """
    task, tokenizer, source = texts.task, texts.tokenizer, texts.tokenizer_source
    found = settings_in_use(adapters, model, tokenizer, task, source)
    set_in_config_(model.config, found)
    if not adapters and mode != "folded" and _changes_words(task, source, tokenizer):
        # Adapters to come are trained with such a space.
        found = Settings(found.model, {**found.tokenizer, "add_prefix_space": True})
    if TASKS[task].prediction != "class":
        return Settled(found, None, (None,) * len(adapters))
    own = problem_type_in(model.config)
    kinds = tuple(problem_type_of(adapter, own) for adapter in adapters)
    base = own if own_head or not kinds else kinds[0]
    written = kinds[0] if mode == "folded" and kinds else base
    # transformers refuses to read single labels of one class.
    alone = model.config.num_labels == 1 and written == SINGLE_LABEL
    model.config.problem_type = None if alone else written
    return Settled(found, base, kinds)


def _changes_words(task: str, source: str, tokenizer: Any | None) -> bool:
    reads_words = tokenizer is not None and TASKS[task].prediction == "word classes"
    return reads_words and with_prefix_space(source, tokenizer) is not tokenizer
