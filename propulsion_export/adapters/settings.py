"""The settings of a base model's files that adapters were trained with."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.settings import (
    SINGLE_LABEL,
    ProblemType,
    Settings,
    reads_padding,
    set_in_tokenizer_,
    settings_for_batches,
)
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ITS_OWN = "problem_type"  # each adapter of an artifact may have another


def settings_in_use(
    adapters: Sequence[Adapter],
    model: "PreTrainedModel",
    tokenizer: Any | None,
    task: str,
    source: str,
) -> Settings:
    """The settings that an artifact of these adapters needs: theirs, and what batches need besides.

    Args:
        adapters: those of the artifact; may be none.
        model: the base model for the task; its weights are not read.
        tokenizer: as transformers loads it, whose padding token is set; None if there is none.
        task: one of `TASKS`.
        source: the base model's name in messages.

    Raises:
        AdapterError: the settings contradict each other or the tokenizer.
        BaseModelError: the model needs a padding token and none can be it.
    """
    joint = _joint(adapters)
    if tokenizer is not None:
        _check_padding_known(adapters, tokenizer, source)
        set_in_tokenizer_(tokenizer, joint)
    found = Settings()
    if not TASKS[task].generates:  # which fills up with any token
        found = settings_for_batches(model, tokenizer, task, source)
    number = {**model.config.to_dict(), **found.model}.get("pad_token_id")
    if reads_padding(model, task) and joint.model.get("pad_token_id", number) != number:
        raise AdapterError(
            *(
                f"adapter {adapter.name}: was trained with the padding token "
                f"{joint.model['pad_token_id']}, the tokenizer of {source} pads with {number}"
                for adapter in adapters
                if "pad_token_id" in adapter.model_settings
            ),
            remedy="Give the base model that it was trained on with -m.",
        )
    return Settings(
        {**joint.model, **found.model},
        {} if tokenizer is None else {**joint.tokenizer, **found.tokenizer},
    )


def problem_type_of(adapter: Adapter, base: ProblemType | None) -> ProblemType | None:
    """What an adapter's logits mean; `base`, the base model's, unless it was trained otherwise.

    A head with several class names of its own was trained on single labels, where the adapter
    says nothing: that is how adapters of earlier versions were trained.
    """
    own: ProblemType | None = adapter.model_settings.get(_ITS_OWN)
    if own is not None:
        return own
    return SINGLE_LABEL if adapter.modules and len(adapter.labels or ()) > 1 else base


def check_settings(
    adapter: Adapter, config: Mapping[str, Any], tokenizer: Mapping[str, Any], where: str
) -> None:
    """Refuse an adapter whose settings contradict an artifact's.

    Args:
        adapter: the adapter to add.
        config: the settings in the artifact's config.json.
        tokenizer: the settings in the artifact's tokenizer_config.json.
        where: the artifact's name in messages.

    Raises:
        AdapterError: naming each setting.
    """
    padding = tokenizer.get("pad_token")
    padding = padding.get("content") if isinstance(padding, dict) else padding
    others = {
        "pad_token_id": config.get("pad_token_id"),
        "pad_token": padding,
        "add_prefix_space": bool(tokenizer.get("add_prefix_space", False)),
    }
    findings = [
        f"adapter {adapter.name}: was trained with {name} {value!r}, {where} has {others[name]!r}"
        for name, value in {**adapter.model_settings, **adapter.tokenizer_settings}.items()
        if name != _ITS_OWN and others[name] not in (None, value)
    ]
    if findings:
        raise AdapterError(*findings, remedy="Export again, with this adapter among the first.")


def _joint(adapters: Sequence[Adapter]) -> Settings:
    model = {adapter.name: dict(adapter.model_settings) for adapter in adapters}
    for settings in model.values():
        settings.pop(_ITS_OWN, None)
    return Settings(
        _union(model), _union({adapter.name: adapter.tokenizer_settings for adapter in adapters})
    )


def _union(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all adapters, given by the adapter's name, together.

    Raises:
        AdapterError: naming two adapters of which one contradicts the other.
    """
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    for adapter, own in settings.items():
        for name, value in own.items():
            if found.setdefault(name, value) != value:
                raise AdapterError(
                    f"adapter {adapter}: was trained with {name} {value!r}, adapter "
                    f"{first[name]} with {found[name]!r}",
                    remedy="Export them apart.",
                )
            first.setdefault(name, adapter)
    return found


def _check_padding_known(adapters: Sequence[Adapter], tokenizer: Any, source: str) -> None:
    strangers = [
        f"adapter {adapter.name}: was trained with the padding token {token!r}, which the "
        f"tokenizer of {source} does not have"
        for adapter in adapters
        if (token := adapter.tokenizer_settings.get("pad_token")) is not None
        and token not in tokenizer.get_vocab()
    ]
    if strangers:
        raise AdapterError(*strangers, remedy="Give the base model that it was trained on with -m.")
