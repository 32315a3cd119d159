"""Compute the oracle in PyTorch: every state of the model, with each adapter and with none."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import with_room, without_scales
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.artifacts.layout import packed_inputs
from propulsion_export.artifacts.tensor_names import LOGITS, MODULES_INPUT
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.progress import Progress
from propulsion_export.errors import BaseModelError, ToolError, first_line
from propulsion_export.graph.sample_inputs import padding_token
from propulsion_export.parity.generation import continue_greedily, padded_inside
from propulsion_export.parity.inputs import judged_length
from propulsion_export.parity.subject import Continuation, Subject
from propulsion_export.runners.decoding import (
    Generator,
    recomputing,
    replaying,
    row_by_row,
)
from propulsion_export.runners.pytorch import torch_candidate
from propulsion_export.scaling.attach import attached

GREEDY_STEPS = 64
_PROMPTS = (5, 12, 9)  # lengths, in tokens, of the prompts that are continued


@dataclass(frozen=True)
class _State:
    """One state of the model to be compared: an adapter to attach, and one to measure against."""

    name: str
    attach: Adapter
    unscaled: Adapter | None


def compute_oracle(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    progress: Progress,
    *,
    steps: int = GREEDY_STEPS,
    feeds: Mapping[str, Tensors] | None = None,
) -> list[Subject]:
    """Compute every state in PyTorch, in float64 and at the artifact's precision.

    Generative models also generate `steps` tokens after the beginnings of three rows. Leaves the
    model of `base` at the artifact's precision. `feeds` has, by name, the inputs of adapters that
    the artifact does not have; they take precedence over its own.
    """
    progress(0.2, "computing the oracle in float64")
    states = _states(artifact, base, adapters, feeds or {})
    if base.model._can_set_experts_implementation():
        base.model.set_experts_implementation("eager")  # the others have no float64
    base.model.double()
    with _float64_tensors(base, batches[0]):
        truths = [_truth(artifact, base, state, batches, steps, feeds or {}) for state in states]
    progress(0.5, f"measuring PyTorch's own error in {artifact.manifest.dtype}")
    base.model.to(getattr(torch, artifact.manifest.dtype))
    return [
        _with_reference(base, state, truth, batches)
        for state, truth in zip(states, truths, strict=True)
    ]


def _states(
    artifact: Artifact, base: BaseModel, adapters: Sequence[Adapter], drawn: Collection[str]
) -> list[_State]:
    """Every adapter, and the base model unless it is folded; a drawn identity has no effect."""
    roomy = [with_room(adapter, base.room, base.label_parameters) for adapter in adapters]
    states = [
        _State(each.name, each, None if idle else without_scales(each))
        for each in roomy
        for idle in [each.name in drawn and each.is_identity()]
    ]
    if artifact.manifest.mode != "folded" or not adapters:
        states.append(_State(BASE_NAME, _default_head(artifact, base), None))
    return states


def _default_head(artifact: Artifact, base: BaseModel) -> Adapter:
    """A head for a base model whose checkpoint has none: the artifact's own default.

    The adapter that it was taken from may have been removed since.
    """
    flat = packed_inputs(artifact, BASE_NAME).get(MODULES_INPUT)
    slots = artifact.manifest.layout.get(MODULES_INPUT, ())
    modules = {
        slot.path: flat[slot.offset : slot.offset + slot.length].reshape(slot.shape).astype(float)
        for slot in slots
        if flat is not None and slot.path in base.missing
    }
    return Adapter(BASE_NAME, scales={}, modules=modules)


def _truth(
    artifact: Artifact,
    base: BaseModel,
    state: _State,
    batches: Sequence[Tensors],
    steps: int,
    drawn: Mapping[str, Tensors],
) -> Subject:
    """The subject as computed in float64; its values at the artifact's precision are missing."""
    without = None
    if state.unscaled is not None:
        with _attached(base, state.unscaled):
            without = tuple(map(_truth_runner(base), batches))
    going, inside = None, None
    with _attached(base, state.attach):
        oracle = tuple(map(_truth_runner(base), batches))
        model = torch_candidate(base.model, base.task)
        if not callable(model):
            going = _continuation(base, model, batches[0], steps)
        if TASKS[base.task].architecture == "decoder":
            inside = _inside(base, batches[0])
    feeds = drawn[state.name] if state.name in drawn else _feeds(artifact, state.name)
    return Subject(state.name, oracle, (), without, feeds, going, inside)


@contextmanager
def _attached(base: BaseModel, adapter: Adapter) -> Iterator[None]:
    with attached(base.model, adapter), _deterministic():
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    """TF32 would make PyTorch's own error, and with it the tolerance, a thousand times larger."""
    before: Any = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _float64_tensors(base: BaseModel, batch: Tensors) -> Iterator[None]:
    """Let tensors that the model makes while it runs be float64 too, where it needs them to be.

    XGLM fills its mask with the lowest float64, which is no float32.

    Raises:
        BaseModelError: the model does not run in float64 at all.
    """
    row = {name: values[:1] for name, values in batch.items()}
    before = torch.get_default_dtype()
    try:
        if _failure(base, row) is not None:
            torch.set_default_dtype(torch.float64)
            if failure := _failure(base, row):
                raise BaseModelError(
                    f"{type(base.model).__name__}: does not run in float64 ({failure}), so there "
                    "is nothing to compare with"
                )
        yield
    finally:
        torch.set_default_dtype(before)


def _failure(base: BaseModel, row: Tensors) -> str | None:
    """What a model says that does not run on a row; None if it does."""
    try:
        _truth_runner(base)(row)
    except (RuntimeError, TypeError, ValueError, ToolError) as error:
        return first_line(error)
    return None


def _truth_runner(base: BaseModel) -> Runner:
    """Run the oracle: a generative model computes every row alone and in one step."""
    model = torch_candidate(base.model, base.task)
    return model if callable(model) else row_by_row(recomputing(model))


def _continuation(
    base: BaseModel, generator: Generator, batch: Tensors, steps: int
) -> Continuation:
    """The oracle's continuation of every prompt alone; the reference is added later."""
    rows = [
        tokens[real][:length]
        for tokens, real, length in zip(
            batch["input_ids"], batch["attention_mask"] == 1, _PROMPTS, strict=False
        )
    ]
    steps = min(steps, judged_length(base.model.config) - max(map(len, rows)))
    padding = padding_token(base.model.config)
    alone = [continue_greedily(generator, generator.pad([row], padding), steps) for row in rows]
    tokens, margins = (np.concatenate(parts) for parts in zip(*alone, strict=True))
    return Continuation(generator.pad(rows, padding), tokens, margins, tokens)


def _inside(base: BaseModel, batch: Tensors) -> Array | None:
    padded = padded_inside(batch)
    logits = _own_runner(base)(padded)[LOGITS]
    finite = np.isfinite(logits[padded["attention_mask"] == 1]).all()
    return logits if finite else None


def _own_runner(base: BaseModel) -> Runner:
    """Run PyTorch as in practice: padded, and step by step with a cache."""
    model = torch_candidate(base.model, base.task)
    return model if callable(model) else replaying(model)


def _feeds(artifact: Artifact, name: str) -> Tensors:
    manifest = artifact.manifest
    # A switchable graph has defaults inside, and the base case is there to prove them.
    bare = name == BASE_NAME and manifest.kind == "onnx" and manifest.mode == "switchable"
    return {} if bare or manifest.mode == "folded" else artifact.feeds(name)


def _with_reference(
    base: BaseModel, state: _State, subject: Subject, batches: Sequence[Tensors]
) -> Subject:
    going = subject.continuation
    with _attached(base, state.attach):
        reference = tuple(map(_own_runner(base), batches))
        model = torch_candidate(base.model, base.task)
        if going is not None and not callable(model):
            tokens, _ = continue_greedily(model, going.prompt, going.tokens.shape[1])
            going = replace(going, reference=tokens)
    return replace(subject, reference=reference, continuation=going)
