"""What PyTorch says: the recorded base model, the inputs, and what every state of it computes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Artifact, Tensors
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.lengths import longest_input
from propulsion_export.manifest import BASE_NAME, MODULES_INPUT
from propulsion_export.parity.cases import Subject
from propulsion_export.pipeline.inputs import (
    Progress,
    check_base,
    labels_of,
    read_texts,
    with_room,
    without_scales,
)
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
    from propulsion_export.base import label_parameters, load_base, model_class_of, read_config
    from propulsion_export.model_fingerprint import fingerprint_of_model

    manifest = artifact.manifest
    source = model or manifest.base.source
    config = read_config(source, trust_remote_code=trust_remote_code)
    growing = label_parameters(
        model_class_of(manifest.task), config, manifest.task, trust_remote_code=trust_remote_code
    )
    base = load_base(
        source,
        task=manifest.task,
        labels=labels_of(adapters, growing),
        trust_remote_code=trust_remote_code,
    )
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


def make_batches(
    base: "Base", inputs: Path | None, seed: int, *, short: bool
) -> tuple[Tensors, ...]:
    """What to compare on: texts of a file, or tokens made, 16 or more inputs in padded batches.

    Raises:
        DataError: the file cannot be read, or has too few texts.
        UsageError: there is no tokenizer to read texts with.
    """
    from propulsion_export.sampling import input_names, parity_inputs, text_inputs

    config = base.model.config
    names = input_names(type(base.model), config)
    if inputs is None:
        longest = REFERENCE_LENGTH if short else None
        return parity_inputs(names, config, seed=seed, longest=longest)
    from propulsion_export.base import read_tokenizer

    tokenizer = read_tokenizer(base.source)
    if tokenizer is None:
        raise UsageError(f"--inputs: {base.source} has no tokenizer to read texts with")
    texts = read_texts(inputs)
    if len(texts) < FEWEST_INPUTS:
        raise DataError(
            f"{inputs}: has {len(texts)} texts, expected at least {FEWEST_INPUTS}: errors are "
            "pooled over them"
        )
    limit = longest_input(config, tokenizer)
    return tuple(
        text_inputs(names, tokenizer, texts[start : start + 4], limit)
        for start in range(0, len(texts), 4)
    )


def ask_torch(
    artifact: Artifact,
    base: "Base",
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    progress: Progress,
) -> list[Subject]:
    """What PyTorch computes in float64 and at the artifact's precision, for every state.

    Leaves the model of `base` at the artifact's precision.
    """
    import torch

    progress(0.2, "computing the oracle in float64")
    states = _states(artifact, base, adapters)
    base.model.double()
    oracles = [_outputs(base, state.attach, batches) for state in states]
    unscaled = [
        None if state.unscaled is None else _outputs(base, state.unscaled, batches)
        for state in states
    ]
    progress(0.5, f"measuring PyTorch's own error in {artifact.manifest.dtype}")
    base.model.to(getattr(torch, artifact.manifest.dtype))
    references = [_outputs(base, state.attach, batches) for state in states]
    return [
        Subject(state.name, oracle, reference, without, _feeds(artifact, state.name))
        for state, oracle, reference, without in zip(
            states, oracles, references, unscaled, strict=True
        )
    ]


@dataclass(frozen=True)
class _State:
    """One state of the model to be compared: an adapter to attach, and one to measure against."""

    name: str
    attach: Adapter
    unscaled: Adapter | None


def _feeds(artifact: Artifact, name: str) -> Tensors:
    if artifact.manifest.mode == "folded":
        return {}
    # ONNX has defaults inside the graph, and the base case is there to prove them.
    bare = name == BASE_NAME and artifact.manifest.kind == "onnx"
    return {} if bare else artifact.feeds(name)


def _states(artifact: Artifact, base: "Base", adapters: Sequence[Adapter]) -> list[_State]:
    room = labels_of(adapters, base.label_parameters)
    roomy = [with_room(adapter, room, base.label_parameters) for adapter in adapters]
    states = [_State(adapter.name, adapter, without_scales(adapter)) for adapter in roomy]
    if artifact.manifest.mode == "switchable":
        states.append(_State(BASE_NAME, _default_head(artifact, base), None))
    return states


def _default_head(artifact: Artifact, base: "Base") -> Adapter:
    """What stands in for a head that the base model's checkpoint does not have.

    The artifact's own default: the adapter that it came from may be gone by now.
    """
    flat = artifact.feeds(BASE_NAME).get(MODULES_INPUT)
    slots = artifact.manifest.layout.get(MODULES_INPUT, ())
    modules = {
        slot.path: flat[slot.offset : slot.offset + slot.length].reshape(slot.shape).astype(float)
        for slot in slots
        if flat is not None and slot.path in base.missing
    }
    return Adapter(BASE_NAME, scales={}, modules=modules)


def _outputs(base: "Base", adapter: Adapter, batches: Sequence[Tensors]) -> tuple[Tensors, ...]:
    from propulsion_export.attach import attached
    from propulsion_export.runners import torch_runner

    with attached(base.model, adapter), _deterministic():
        run = torch_runner(base.model)
        return tuple(run(batch) for batch in batches)


@contextmanager
def _deterministic() -> Iterator[None]:
    """TF32 would make PyTorch's own error, and with it the tolerance, a thousand times larger."""
    import torch

    before: Any = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
