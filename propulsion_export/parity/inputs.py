"""Load the recorded base model, and make the inputs to compare on."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import labels_of
from propulsion_export.adapters.provenance import absolute, check_base
from propulsion_export.adapters.scales import Array
from propulsion_export.adapters.settings import check_settings
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.merged_base import check_not_merged, check_undamaged
from propulsion_export.artifacts.tensor_names import MODULES_INPUT
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.base_model.hub import check_findable
from propulsion_export.base_model.loading import BaseModel, load_base
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.base_model.model_inputs import check_text_is_enough, extra_inputs
from propulsion_export.base_model.positions import longest_input
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.base_model.settings import (
    Settings,
    read_tokenizer_settings,
    set_in_config_,
)
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.reading import read_tokenizer, text_inputs
from propulsion_export.base_model.tokenizer.token_ids import check_token_ids
from propulsion_export.base_model.tokenizer.words import joined
from propulsion_export.data.texts import read_texts
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.graph.sample_inputs import (
    input_names,
    padded_left,
    random_batch,
    with_one_eos,
)
from propulsion_export.runners.opening import REFERENCE_LENGTH
from propulsion_export.scaling.resizing import resize_for_

FEWEST_INPUTS = 16
_LONGEST = 48
_BATCHES, _ROWS = 4, 4
FEWEST_DECODED = 7  # fewest tokens for a causal model, so that every step has tokens before it
_DECODED = 8


def load_recorded_base(
    artifact: Artifact,
    adapters: Sequence[Adapter],
    model: str | None,
    *,
    trust_remote_code: bool = False,
) -> BaseModel:
    """The base model an artifact was made from, at `model` or where the artifact says.

    Raises:
        BaseModelError: it cannot be loaded, is damaged or another model, or holds an adapter
            already.
    """
    manifest = artifact.manifest
    source = absolute(model) if model else manifest.base.source
    check_findable(source)
    check_not_merged(source, adapters)
    check_undamaged(source)
    base = load_base(source, task=manifest.task, trust_remote_code=trust_remote_code)
    count = _label_room(artifact, adapters, base.label_parameters)
    if count is not None:
        base.make_room_(count)
    for adapter in adapters:
        base.check_complete(adapter.modules)
    _use_recorded_settings_(base, artifact, adapters)
    fingerprint = fingerprint_of_model(base.model)
    if difference := manifest.base.fingerprint.difference(fingerprint):
        raise BaseModelError(
            f"{source}: is not the base model the artifact was made from ({difference})",
            remedy="Give its directory or name with -m.",
        )
    check_base(fingerprint, source, adapters)
    for adapter in adapters:
        resize_for_(base, adapter, trust_remote_code=trust_remote_code)
    return base


def make_batches(
    base: BaseModel,
    inputs: Path | None,
    seed: int,
    *,
    short: bool,
    trust_remote_code: bool = False,
    directory: Path | None = None,
) -> tuple[Tensors, ...]:
    """Padded batches of at least 16 inputs: the texts of a file, or random tokens.

    Batches for a causal language model are padded on the left; batches for an encoder-decoder
    also have tokens for its decoder. Texts are read with the tokenizer in
    `directory`, or with the base model's.

    Raises:
        DataError: the file cannot be read, or has too few texts.
        UsageError: there is no tokenizer to read texts with.
        BaseModelError: the tokenizer cannot be read.
    """
    config = base.model.config
    names = input_names(type(base.model), config)
    longest = REFERENCE_LENGTH if short else None
    if inputs is not None:
        places = [base.source] if directory is None else [str(directory), base.source]
        found = (read_tokenizer(place, trust_remote_code=trust_remote_code) for place in places)
        tokenizer = next((one for one in found if one is not None), None)
        batches = _of_texts(base, tokenizer, inputs, names)
    elif TASKS[base.task].architecture == "decoder":
        batches = decoder_inputs(config, seed=seed, longest=longest)
    else:
        batches = parity_inputs(names, config, seed=seed, longest=longest)
    if TASKS[base.task].architecture == "encoder-decoder":
        return with_decoder_tokens(batches, config, seed=seed)
    if pools_at_eos(config, base.task) and inputs is None:
        return tuple(with_one_eos(batch, config) for batch in batches)
    return batches


def judged_length(config: PretrainedConfig, tokenizer: Any | None = None) -> int:
    """The most tokens of a row: what the model takes, up to where its rope switches.

    Rows on two sides of a switch change each other in a batch, also in PyTorch.
    """
    longest = longest_input(config, tokenizer)
    return min(longest, *rope_switches(config.to_dict()), longest)


def parity_inputs(
    names: tuple[str, ...], config: PretrainedConfig, *, seed: int, longest: int | None = None
) -> tuple[Tensors, ...]:
    """4 padded batches of 4 rows of 3 to `longest` random tokens, 16 inputs in all."""
    chooser = np.random.default_rng(seed)
    longest = min(longest or _LONGEST, judged_length(config))
    return tuple(
        random_batch(names, config, tuple(chooser.integers(3, longest + 1, _ROWS)), chooser)
        for _ in range(_BATCHES)
    )


def decoder_inputs(
    config: PretrainedConfig, *, seed: int, longest: int | None = None
) -> tuple[Tensors, ...]:
    """4 batches of 4 rows of 7 to `longest` random tokens, padded on the left."""
    chooser = np.random.default_rng(seed)
    longest = min(longest or _LONGEST, judged_length(config))
    names = ("input_ids", "attention_mask")
    drawn = (chooser.integers(FEWEST_DECODED, longest + 1, _ROWS) for _ in range(_BATCHES))
    return tuple(padded_left(random_batch(names, config, tuple(each), chooser)) for each in drawn)


def with_decoder_tokens(
    batches: Iterable[Tensors], config: PretrainedConfig, *, seed: int
) -> tuple[Tensors, ...]:
    """Add `decoder_input_ids`, int64 [rows, 8], to batches: the start token and 7 random ones."""
    chooser = np.random.default_rng(seed + 1)
    extended = []
    for batch in batches:
        lengths = (_DECODED,) * len(batch["input_ids"])
        tokens = random_batch(("input_ids",), config, lengths, chooser)["input_ids"]
        extended.append({**batch, "decoder_input_ids": shifted_right(tokens, config)})
    return tuple(extended)


def shifted_right(tokens: Array, config: PretrainedConfig) -> Array:
    """Tokens moved behind the one that a decoder starts with; int64 [rows, length]."""
    shifted = np.roll(tokens, 1, axis=1)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted


def _label_room(
    artifact: Artifact, adapters: Sequence[Adapter], label_parameters: frozenset[str]
) -> int | None:
    """The number of labels the artifact's head has room for; None for the base model's own head.

    It is read from the layout first: the adapter with the most labels may have been removed.
    """
    slots = artifact.manifest.layout.get(MODULES_INPUT, ())
    widths = [slot.shape[0] for slot in slots if slot.path in label_parameters]
    return max(widths) if widths else labels_of(adapters, label_parameters)


def _use_recorded_settings_(
    base: BaseModel, artifact: Artifact, adapters: Sequence[Adapter]
) -> None:
    """Make the oracle pad with the token that the artifact's config.json names.

    Raises:
        AdapterError: an adapter was trained with other settings than the artifact has.
    """
    settings = read_settings(artifact.directory)
    tokenizer = read_tokenizer_settings(artifact.directory)
    for adapter in adapters:
        check_settings(adapter, settings, tokenizer, str(artifact.directory))
    padding = settings.get("pad_token_id")
    if isinstance(padding, int):
        set_in_config_(base.model.config, Settings({"pad_token_id": padding}))


def _of_texts(
    base: BaseModel, tokenizer: Any | None, inputs: Path, names: tuple[str, ...]
) -> tuple[Tensors, ...]:
    if tokenizer is None:
        raise UsageError(f"--inputs: {base.source} has no tokenizer to read texts with")
    check_text_is_enough(extra_inputs(base.model.config), "--inputs")
    texts = [joined(text) for text in read_texts(inputs, base.task)]
    check_token_ids(base.source, tokenizer, base.model.config.to_dict())
    if len(texts) < FEWEST_INPUTS:
        raise DataError(
            f"{inputs}: has {len(texts)} texts, expected at least {FEWEST_INPUTS}: errors are "
            "pooled over them"
        )
    limit = judged_length(base.model.config, tokenizer)
    batches = (
        text_inputs(names, tokenizer, texts[start : start + 4], limit)
        for start in range(0, len(texts), 4)
    )
    on_left = TASKS[base.task].architecture == "decoder"
    return tuple(padded_left(batch) if on_left else batch for batch in batches)
