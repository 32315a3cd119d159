"""Compute the oracle in PyTorch: every state of the model, with each adapter and with none.

What two states have in common is computed once: an adapter without a head and biases, its scales
taken away, is the base model.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.environment.progress import Progress
from propulsion_export.errors import BaseModelError, ToolError, first_line
from propulsion_export.parity.alone import PaddingChangesRowsError
from propulsion_export.parity.continuing import Draft, Drafted, drafted
from propulsion_export.parity.forwards import Compute, Work, compute_whole
from propulsion_export.parity.generation import continue_greedily
from propulsion_export.parity.questions import (
    Question,
    continuation,
    logits_padded_inside,
    outputs_in_float64,
    own_choices,
    own_outputs,
)
from propulsion_export.parity.states import State, effect_of, feeds_of, states_of
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import Generator
from propulsion_export.runners.pytorch import torch_candidate

GREEDY_STEPS = 64


@dataclass(frozen=True)
class _Plan:
    """What is computed, and how.

    Attributes:
        base: the base model.
        batches: the inputs.
        compute: the way to compute.
        gaps: whether a decoder's logits with padding between tokens are wanted.
        drafts: by state, drafts of greedy continuations; empty unless the model generates.
        in_one_step: numbers of the batches that PyTorch reads without a cache at the precision.
    """

    base: BaseModel
    batches: Sequence[Tensors]
    compute: Compute
    gaps: bool
    drafts: Mapping[str, Drafted]
    in_one_step: Container[int] = ()

    @property
    def architecture(self) -> str:
        """Of the task: `encoder`, `decoder` or `encoder-decoder`."""
        return TASKS[self.base.task].architecture


def compute_oracle(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    progress: Progress,
    *,
    steps: int = GREEDY_STEPS,
    feeds: Mapping[str, Tensors] | None = None,
    compute: Compute | None = None,
    draft: Draft | None = None,
    gaps: bool = True,
    in_one_step: Container[int] = (),
) -> list[Subject]:
    """Compute every state in PyTorch, in float64 and at the artifact's precision.

    Generative models also generate `steps` tokens after the beginnings of three rows. May leave the
    model of `base` at the artifact's precision.

    Args:
        artifact: what is judged.
        base: its base model.
        adapters: its adapters, or those drawn for it.
        batches: the inputs to compute with.
        progress: called with the share done.
        steps: the number of tokens to generate.
        feeds: by name, the inputs of adapters that the artifact does not have; they take precedence
            over its own.
        compute: the way to compute; default: with the whole model in memory, on the CPU.
        draft: generates what the oracle then goes over, see `continuing`; the candidate. Default:
            the oracle itself.
        gaps: whether the artifact reads padding between tokens, so that `Subject.inside` is wanted.
        in_one_step: numbers of the batches for which PyTorch's own error is measured without a
            cache, which takes a fraction of the time.

    Raises:
        BaseModelError: the model does not run in float64.
    """
    progress(0.2, "computing the oracle in float64")
    states = states_of(artifact, base, adapters, feeds or {})
    if base.model._can_set_experts_implementation():
        base.model.set_experts_implementation("eager")  # the others have no float64
    fed = {each.name: feeds_of(artifact, each.name, feeds or {}) for each in states}
    plan = _Plan(base, batches, compute or compute_whole("cpu"), gaps, {}, in_one_step)
    plan = replace(plan, drafts=_drafts(plan, states, steps, draft, fed))
    truths = _truths(plan, states, fed)
    progress(0.5, f"measuring PyTorch's own error in {artifact.manifest.dtype}")
    return _with_references(plan, states, truths, getattr(torch, artifact.manifest.dtype))


def _drafts(
    plan: _Plan,
    states: Sequence[State],
    steps: int,
    draft: Draft | None,
    fed: Mapping[str, Tensors],
) -> dict[str, Drafted]:
    """A draft of every state's greedy continuation; none unless the model generates."""
    model = torch_candidate(plan.base.model, plan.base.task)
    if callable(model):
        return {}
    drafts = {}
    for state in states:
        feeds = fed[state.name]
        ask = _own_draft(plan, state) if draft is None else _with_feeds(draft, feeds)
        drafts[state.name] = drafted(plan.base, model, plan.batches[0], ask, steps)
        if draft is None:
            drafts[state.name] = replace(drafts[state.name], candidate=None)
    return drafts


def _with_feeds(draft: Draft, feeds: Tensors) -> Draft:
    return lambda prompt, steps: draft({**prompt, **feeds}, steps)


def _own_draft(plan: _Plan, state: State) -> Draft:
    """Generate with the oracle itself, step by step."""

    def own(prompt: Tensors, steps: int) -> tuple[Array, Array]:
        def go_on(generator: Generator) -> Tensors:
            tokens, margins = continue_greedily(generator, prompt, steps)
            return {"tokens": tokens, "margins": margins}

        ((found,),) = _computed(plan, [Work(state.attach, [go_on])], torch.float64)
        return found["tokens"], found["margins"]

    return own


def _truths(plan: _Plan, states: Sequence[State], fed: Mapping[str, Tensors]) -> list[Subject]:
    """The subjects as computed in float64; their values at the artifact's precision are missing."""
    try:
        return _asked_truths(plan, states, fed, together=True)
    except PaddingChangesRowsError as error:
        effect = error.effect
    except BaseModelError:
        if plan.architecture != "encoder":
            raise
        effect = math.inf  # rows alone are too short for some models
    truths = _asked_truths(plan, states, fed, together=False)
    return [replace(truth, padding_effect=effect) for truth in truths]


def _asked_truths(
    plan: _Plan, states: Sequence[State], fed: Mapping[str, Tensors], *, together: bool
) -> list[Subject]:
    outputs = outputs_in_float64(plan.base, plan.batches, together=together)
    wants_inside = plan.gaps and plan.architecture == "decoder"
    inside = logits_padded_inside(plan.batches[0]) if wants_inside else None
    going = {n: continuation(plan.base, d, together=together) for n, d in plan.drafts.items()}
    wanted: dict[str, tuple[Adapter, list[Question]]] = {}
    for state in states:
        for adapter in filter(None, (state.unscaled, state.attach)):
            wanted.setdefault(effect_of(adapter), (adapter, [outputs]))
        questions = wanted[effect_of(state.attach)][1]
        questions += [q for q in (inside, going.get(state.name)) if q and q not in questions]
    answers = _ask(plan, wanted, torch.float64)
    subjects = []
    for state in states:
        found = answers[effect_of(state.attach)]
        without = state.unscaled and answers[effect_of(state.unscaled)]
        subjects.append(
            Subject(
                state.name,
                oracle=found[outputs],
                reference=(),
                unscaled=without[outputs] if without else None,
                feeds=fed[state.name],
                continuation=found[going[state.name]] if going else None,
                inside=found[inside] if inside else None,
            )
        )
    return subjects


def _with_references(
    plan: _Plan, states: Sequence[State], truths: Sequence[Subject], dtype: torch.dtype
) -> list[Subject]:
    outputs = own_outputs(plan.base, plan.batches, in_one_step=plan.in_one_step)
    going = {
        truth.name: own_choices(plan.base, plan.drafts[truth.name])
        for truth in truths
        if truth.continuation is not None and truth.continuation.may_part
    }
    wanted = {
        state.name: (state.attach, [outputs, *filter(None, [going.get(state.name)])])
        for state in states
    }
    answers = _ask(plan, wanted, dtype)
    subjects = []
    for truth in truths:
        found, continued = answers[truth.name], truth.continuation
        if continued is not None and truth.name in going:
            continued = replace(continued, reference=found[going[truth.name]])
        subjects.append(replace(truth, reference=found[outputs], continuation=continued))
    return subjects


def _ask(
    plan: _Plan, wanted: Mapping[str, tuple[Adapter, Sequence[Question]]], dtype: torch.dtype
) -> dict[str, dict[Question, Any]]:
    """The answers to the questions about every adapter, those with fewest scales first."""
    order = sorted(wanted, key=lambda name: len(wanted[name][0].scales))
    works = [
        Work(adapter, [item for question in questions for item in question.items])
        for adapter, questions in map(wanted.__getitem__, order)
    ]
    found = _computed(plan, works, dtype)
    answers = {}
    for name in reversed(order):
        remaining = iter(found.pop())  # outputs are large: what has been read is let go
        answers[name] = {
            question: question.read([next(remaining) for _ in question.items])
            for question in wanted[name][1]
        }
    return answers


def _computed(plan: _Plan, works: Sequence[Work], dtype: torch.dtype) -> list[list[Tensors]]:
    try:
        return plan.compute(plan.base, works, dtype)
    except (RuntimeError, TypeError, ValueError, ToolError) as error:
        if dtype != torch.float64:
            raise
        raise BaseModelError(
            f"{type(plan.base.model).__name__}: does not run in float64 ({first_line(error)}), so "
            "there is nothing to compare with"
        ) from error
