"""What a verdict starts from: the recorded base model, and the inputs to compare on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Artifact, Tensors
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.lengths import longest_input
from propulsion_export.manifest import MODULES_INPUT
from propulsion_export.pipeline.inputs import check_base, labels_of, read_texts
from propulsion_export.pipeline.running import REFERENCE_LENGTH

if TYPE_CHECKING:
    from propulsion_export.base import Base

FEWEST_INPUTS = 16


def load_recorded_base(
    artifact: Artifact,
    adapters: Sequence[Adapter],
    model: str | None,
    *,
    trust_remote_code: bool = False,
) -> "Base":
    """The base model an artifact was made from, at `model` or where the artifact says.

    Raises:
        BaseModelError: it cannot be loaded, or is another one.
    """
    from propulsion_export.base import load_base
    from propulsion_export.model_fingerprint import fingerprint_of_model

    manifest = artifact.manifest
    source = model or manifest.base.source
    base = load_base(source, task=manifest.task, trust_remote_code=trust_remote_code)
    count = _label_room(artifact, adapters, base.label_parameters)
    if count is not None:
        base.make_room_(count)
    for adapter in adapters:
        base.check_complete(adapter.modules)
    fingerprint = fingerprint_of_model(base.model)
    if difference := manifest.base.fingerprint.difference(fingerprint):
        raise BaseModelError(
            f"{source}: is not the base model the artifact was made from ({difference})",
            remedy="Say where that lies with -m.",
        )
    check_base(fingerprint, source, adapters)
    return base


def _label_room(
    artifact: Artifact, adapters: Sequence[Adapter], label_parameters: frozenset[str]
) -> int | None:
    """How many labels the artifact's head has room for; None when it has that of the base model.

    The adapter that had the most may have been removed.
    """
    slots = artifact.manifest.layout.get(MODULES_INPUT, ())
    widths = [slot.shape[0] for slot in slots if slot.path in label_parameters]
    return max(widths) if widths else labels_of(adapters, label_parameters)


def make_batches(
    base: "Base", inputs: Path | None, seed: int, *, short: bool
) -> tuple[Tensors, ...]:
    """What to compare on: texts of a file, or tokens made, 16 or more inputs in padded batches.

    Those for a causal language model are padded on the left; those for an encoder-decoder have
    tokens for its decoder too.

    Raises:
        DataError: the file cannot be read, or has too few texts.
        UsageError: there is no tokenizer to read texts with.
    """
    from propulsion_export import sampling

    config = base.model.config
    names = sampling.input_names(type(base.model), config)
    longest = REFERENCE_LENGTH if short else None
    if inputs is not None:
        batches = _of_texts(base, inputs, names)
    elif base.task == "text-generation":
        batches = sampling.decoder_inputs(config, seed=seed, longest=longest)
    else:
        batches = sampling.parity_inputs(names, config, seed=seed, longest=longest)
    if base.task == "text2text-generation":
        return sampling.with_decoder_tokens(batches, config, seed=seed)
    return batches


def _of_texts(base: "Base", inputs: Path, names: tuple[str, ...]) -> tuple[Tensors, ...]:
    from propulsion_export.base import read_tokenizer
    from propulsion_export.sampling import padded_left, text_inputs

    tokenizer = read_tokenizer(base.source)
    if tokenizer is None:
        raise UsageError(f"--inputs: {base.source} has no tokenizer to read texts with")
    texts = read_texts(inputs)
    if len(texts) < FEWEST_INPUTS:
        raise DataError(
            f"{inputs}: has {len(texts)} texts, expected at least {FEWEST_INPUTS}: errors are "
            "pooled over them"
        )
    limit = longest_input(base.model.config, tokenizer)
    batches = (
        text_inputs(names, tokenizer, texts[start : start + 4], limit)
        for start in range(0, len(texts), 4)
    )
    on_left = base.task == "text-generation"
    return tuple(padded_left(batch) if on_left else batch for batch in batches)
