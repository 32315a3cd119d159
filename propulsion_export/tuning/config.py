"""The configuration of a Propulsion adapter, which adapter_config.json stores."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from propulsion_export.base_model.settings import wrong_model_settings, wrong_tokenizer_settings
from propulsion_export.errors import UsageError

PRESETS = ("all", "attention")


@dataclass
class PropulsionConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of a Propulsion adapter: V' = V * z**degree.

    Args:
        target_modules: the layers to scale. `all` (the default): every linear layer and embedding
            of the base model, without the lm_head and task heads; in a mixture of experts each
            expert has its own vectors, and routers that are not plain linear layers have none.
            `attention`: the query, key and value projections. A list: paths or their endings. Any
            other string: a regular expression for the whole path. The last two may name norms and
            heads too.
        exclude_modules: paths or endings, or one regular expression, to leave out.
        degree: the power z is raised to, positive; the paper uses 15 for most tasks. With a
            non-integer degree a z below zero gives NaN.
        train_bias: also train the biases of the scaled layers; they belong to the adapter.
        modules_to_save: modules trained and saved whole, such as a new classification head.
        labels: class names in the order of the logits, stored for the export.
        base_fingerprint: the base model's fingerprint as JSON; set when the adapter is attached.
        model_settings: what training changed in the base model's config.json, such as
            `pad_token_id`; its `problem_type` is set when the adapter is attached.
        tokenizer_settings: what it changed in tokenizer_config.json, such as `pad_token`.
        scaled_modules: the number of vectors of the adapter, so that a lost one is noticed; set
            when the adapter is attached.

    Raises:
        UsageError: a value is invalid.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    degree: float = field(default=15)
    train_bias: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)
    labels: list[str] | None = field(default=None)
    base_fingerprint: dict[str, Any] | None = field(default=None)
    model_settings: dict[str, Any] | None = field(default=None)
    tokenizer_settings: dict[str, Any] | None = field(default=None)
    scaled_modules: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROPULSION
        self.target_modules = _names("target_modules", self.target_modules) or "all"
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        findings = [
            *_wrong_degree(self.degree),
            *_wrong_targets("target_modules", self.target_modules),
            *_wrong_targets("exclude_modules", self.exclude_modules),
            *_wrong_labels(self.labels),
            *wrong_model_settings(self.model_settings),
            *wrong_tokenizer_settings(self.tokenizer_settings),
        ]
        if findings:
            raise UsageError(*findings)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, names in a fixed order."""
        # PEFT shortens long lists to sets, whose order changes with every run.
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in asdict(self).items()
        }


def _names(option: str, value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value):
        if value or option == "exclude_modules":
            return sorted(value)
        raise UsageError(f"{option}: is empty, expected at least one module")
    raise UsageError(f"{option}: is {value!r}, expected names or a regular expression")


def _wrong_degree(degree: Any) -> list[str]:
    number = isinstance(degree, int | float) and not isinstance(degree, bool)
    if number and math.isfinite(degree) and degree > 0:
        return []
    return [f"degree: is {degree!r}, expected a positive number"]


def _wrong_targets(option: str, value: list[str] | str | None) -> list[str]:
    if not isinstance(value, str):
        return []
    if value == "all-linear":  # PEFT would expand it later, to other modules
        return [f"{option}: 'all-linear' is not supported, expected 'all' or 'attention'"]
    try:
        re.compile(value)
    except re.error as error:
        return [f"{option}: {value!r} is no regular expression ({error})"]
    return []


def _wrong_labels(labels: Any) -> list[str]:
    if labels is None or (
        isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    ):
        return []
    return [f"labels: is {labels!r}, expected a list of names"]
