"""Load a base model with its tokenizer and a head for training, and put an adapter on it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from safetensors import SafetensorError
from torch import nn

from propulsion_export.artifacts.merged_base import check_undamaged
from propulsion_export.base_model.chat.templates import read_template_file
from propulsion_export.base_model.config import read_config, set_labels
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.gguf.parameters import with_steps
from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.base_model.hub import check_findable
from propulsion_export.base_model.loading import load_model, model_class_of
from propulsion_export.base_model.model_inputs import (
    check_inputs,
    check_text_is_enough,
    extra_inputs,
)
from propulsion_export.base_model.positions import longest_input
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.base_model.settings import (
    SINGLE_LABEL,
    Settings,
    set_in_config_,
    set_in_tokenizer_,
    settings_for_batches,
    with_prefix_space,
)
from propulsion_export.base_model.tokenizer.reading import read_tokenizer
from propulsion_export.base_model.tokenizer.token_ids import check_token_ids
from propulsion_export.environment.paths import user_path
from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import (
    ArtifactError,
    BaseModelError,
    DataError,
    UsageError,
    first_line,
)
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.probe import leaks_in_a_block, looks_ahead
from propulsion_export.tuning import PropulsionConfig


@dataclass(frozen=True)
class TrainableBase:
    """A base model under a task head, as loaded.

    Attributes:
        name: the resolved path of a local model, else its name on a hub.
        model: the model with a head for the classes, or with its own lm_head.
        tokenizer: the model's tokenizer, with a padding token.
        heads: names of the children of `model` that are not the base model and hold parameters;
            none for generated text.
        absent: module paths inside the base model whose weights are not in the checkpoint; they
            start at random, and are trained and saved like a head.
        settings: what is set in `model` and `tokenizer` otherwise than in the base model's files.
    """

    name: str
    model: Any
    tokenizer: Any
    heads: tuple[str, ...]
    absent: tuple[str, ...]
    settings: Settings = field(default_factory=Settings)


def load_trainable(
    model: str | Path, classes: Sequence[str], options: TrainOptions
) -> TrainableBase:
    """Load a base model for a task; the seed fixes the values of a new head for the `classes`.

    Raises:
        BaseModelError: there is no such model, it has no safetensors weights, or transformers
            knows no such head for it; it is not a language model, or cannot keep packed passages
            apart.
    """
    name = _resolved(model)
    check_findable(name)
    check_undamaged(name)
    transformers.set_seed(options.seed)
    with _load_errors_as_ours(name):
        config = read_config(name, trust_remote_code=options.trust_remote_code)
        plain = _tokenizer(name, options)
        tokenizer = _for_words(name, plain, options)
        _set_up_(config, classes, options)
        check_token_ids(name, tokenizer, config.to_dict())
    loaded, lacking = load_model(
        model_class_of(options.task),
        name,
        config,
        dtype=getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    settings = _settings_(name, loaded, tokenizer, options, spaced=tokenizer is not plain)
    generates = options.task_entry.generates
    check_inputs(type(loaded), loaded.config, name, generates=generates, images=True)
    check_text_is_enough(extra_inputs(loaded.config), name)
    missing = sorted(lacking)
    if options.task_entry.generates:
        _check_language_model(name, loaded, tokenizer, missing)
        _check_passages_apart(name, loaded, options)
        return TrainableBase(name, loaded, tokenizer, heads=(), absent=(), settings=settings)
    heads = _heads(name, loaded)
    owners = {key.rpartition(".")[0] for key in missing}
    absent = sorted(owner for owner in owners if owner.split(".")[0] not in heads)
    return TrainableBase(name, loaded, tokenizer, heads, tuple(absent), settings)


def attach_adapter(base: TrainableBase, classes: Sequence[str], options: TrainOptions) -> Any:
    """Freeze the base model and put vectors on it; heads and absent modules train in float32.

    Returns a `PeftModel`; `base.model` is changed in place.
    """
    saved = [*base.heads, *base.absent]
    config = PropulsionConfig(
        task_type=options.task_entry.peft_type,
        target_modules=options.placement,
        degree=options.degree,
        train_bias=options.train_bias,
        modules_to_save=list(saved) or None,
        labels=list(classes) or None,
        model_settings=dict(base.settings.model) or None,
        tokenizer_settings=dict(base.settings.tokenizer) or None,
    )
    model = get_peft_model(base.model, config)
    recorded = model.peft_config["default"]
    recorded.base_model_name_or_path = base.name
    if recorded.base_fingerprint is not None and (file := find_gguf(base.name)) is not None:
        found = Fingerprint.from_json(recorded.base_fingerprint)
        recorded.base_fingerprint = with_steps(found, file).to_json()
    recorded.modules_to_save = saved or None  # PEFT had added the names of heads that may not exist
    if options.dtype != "float32":
        for path in saved:
            _train_in_float32_(base.model.get_submodule(path), inside=path in base.absent)
    return model


def longest_text(base: TrainableBase, options: TrainOptions) -> int:
    """How many tokens a text may have: `max_length`, or fewer if the base model takes fewer.

    Raises:
        UsageError: the base model's rotary frequencies change within that length, and a batch has
            several rows: the longest would decide for all.
    """
    wanted = options.max_length or options.training.max_length
    longest = min(wanted, longest_input(base.model.config, base.tokenizer))
    switch = min(rope_switches(base.model.config.to_dict()), default=longest)
    if switch < longest and options.batch_size > options.gradient_accumulation_steps:
        raise UsageError(
            f"--max-length: {longest}, expected at most {switch}: the rotary frequencies of "
            f"{base.name} change there, and the longest row of a batch decides for all",
            remedy=f"Give --max-length {switch}, or as many --gradient-accumulation-steps as rows.",
        )
    return longest


def _resolved(model: str | Path) -> str:
    path = find_gguf(model) or user_path(model)
    if path.exists():
        return str(path.resolve())
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        raise BaseModelError(
            f"{model}: does not exist, expected a directory or GGUF file with a base model"
        )
    return model


@contextmanager
def _load_errors_as_ours(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        check_permission(name, BaseModelError)
        raise BaseModelError(f"{name}: cannot be loaded ({first_line(error)})") from error


def _tokenizer(name: str, options: TrainOptions) -> Any:
    tokenizer = read_tokenizer(name, trust_remote_code=options.trust_remote_code)
    if tokenizer is None:
        raise BaseModelError(
            f"{name}: has no tokenizer files, expected a tokenizer to read texts with",
            remedy="Copy the tokenizer into the base model's directory, as tokenizer.json.",
        )
    if options.task_entry.generates:
        # Padding on the left would shift the positions, which count from the start of the row.
        tokenizer.padding_side = "right"
    if options.chat_template is not None:
        file = user_path(options.chat_template)
        try:
            tokenizer.chat_template = read_template_file(file)
        except ArtifactError as error:
            raise DataError(*error.findings) from error
    return tokenizer


def _for_words(name: str, tokenizer: Any, options: TrainOptions) -> Any:
    """The tokenizer for lists of words, where the task has them."""
    if not options.task_entry.needs_offsets:
        return tokenizer
    if not tokenizer.is_fast:
        raise BaseModelError(
            f"{name}: has a tokenizer that does not map tokens to words, expected "
            "a fast tokenizer (tokenizer.json)"
        )
    # The first word then has the tokens that it has behind another.
    return with_prefix_space(name, tokenizer, trust_remote_code=options.trust_remote_code)


def _settings_(
    name: str, model: Any, tokenizer: Any, options: TrainOptions, *, spaced: bool
) -> Settings:
    """Set in model and tokenizer what batches need; returns all that differs from their files."""
    found = settings_for_batches(model, tokenizer, options.task, name)
    set_in_config_(model.config, found)
    set_in_tokenizer_(tokenizer, found)
    if tokenizer.pad_token is None:
        raise BaseModelError(
            f"{name}: its tokenizer has neither a padding nor an end token, expected one to fill "
            "up the shorter rows of a batch"
        )
    kind = {"problem_type": SINGLE_LABEL} if options.task_entry.prediction == "class" else {}
    return Settings(
        {**found.model, **kind},
        {**found.tokenizer, **({"add_prefix_space": True} if spaced else {})},
    )


def _set_up_(config: Any, classes: Sequence[str], options: TrainOptions) -> None:
    """Change a base model's configuration to what is trained."""
    if classes:
        set_labels(config, classes)
    else:
        config.use_cache = False
    if options.task_entry.prediction == "class":
        config.problem_type = SINGLE_LABEL


def _check_language_model(name: str, model: Any, tokenizer: Any, missing: Sequence[str]) -> None:
    kind = type(model).__name__
    if missing:
        raise BaseModelError(
            *(f"{name}: {key} is not in the checkpoint, expected for {kind}" for key in missing),
            remedy="Nothing would train it: give a checkpoint of a whole language model.",
        )
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"{name}: its tokenizer has no end-of-sequence token, expected one to end a text"
        )
    if not model.config.is_encoder_decoder and looks_ahead(model):
        raise BaseModelError(
            f"{name}: {kind} sees the tokens that it has to predict, expected a decoder"
        )


def _check_passages_apart(name: str, model: Any, options: TrainOptions) -> None:
    if not options.packing:
        return
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not takes or leaks_in_a_block(model):
        raise BaseModelError(
            f"{name}: {type(model).__name__} cannot keep the passages of a block apart by their "
            "positions",
            remedy="Train without --packing.",
        )


def _heads(name: str, model: Any) -> tuple[str, ...]:
    heads = tuple(
        child
        for child, module in model.named_children()
        if child != model.base_model_prefix and next(module.parameters(), None) is not None
    )
    if not heads or not hasattr(model, model.base_model_prefix):
        raise BaseModelError(
            f"{name}: {type(model).__name__} cannot be split into a base model and a head"
        )
    return heads


def _train_in_float32_(module: nn.Module, *, inside: bool) -> None:
    """Make a trained module float32 in a bfloat16 model, where small steps would be lost.

    Its inputs become float32; for a module `inside` the base model, the output gets the dtype of
    the inputs again.
    """
    module.float()

    def widen(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(widen, with_kwargs=True)
    if inside:
        module.register_forward_hook(lambda _, args, output: output.to(args[0].dtype))


def _wide(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if floating else value
