"""Why PyTorch itself errs by more than rounding explains, and where in the model.

| finding | how it is told |
|---|---|
| overflow | a weight or a module's output is not finite at this precision, and is in float64 |
| another function | PyTorch's own way to run the inputs is as far from the truth in float64 too |
| ties | experts of a mixture that a router puts level but for rounding, see `ties` |
| instability | the relative error of some module is many times that of all modules before it |

Nothing here runs unless an error is too large.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.dtypes import cast_
from propulsion_export.parity.alone import PaddingChangesRowsError
from propulsion_export.parity.comparison import UNIT_ROUNDOFF, OutputErrors, hidden_positions
from propulsion_export.parity.differences import differences, without_ruled_out
from propulsion_export.parity.evidence import Evidence
from propulsion_export.parity.forwards import Item, Work
from propulsion_export.parity.probes import hidden_rows
from propulsion_export.parity.questions import (
    Question,
    outputs_in_float64,
    own_procedures,
    row_alone,
)
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.states import states_of
from propulsion_export.parity.subject import Subject
from propulsion_export.parity.ties import first_ties, routers_of

_REMEDY = "Export in float32, or in bfloat16 where float16 overflows."


def judge_own_error(evidence: Evidence, checks: Iterable[Check]) -> Iterator[Check]:
    """A failed check for every state whose reference errs by more than rounding explains.

    Ties between experts are told of every state that fails, because rounding and a mistake look
    alike there.

    Args:
        evidence: of the verdict.
        checks: those of the case `parity`, compared with a ceiling.
    """
    subjects = {subject.name: subject for subject in evidence.subjects}
    for check in checks:
        if check.case != "parity" or not check.outputs:
            continue
        subject, worst = subjects[check.adapter], max(check.outputs, key=_excess)
        if not worst.is_explained:
            yield _condemn(evidence, subject, worst)
        elif not check.passed and (told := _told_of_ties(_Case.of(evidence, subject, worst))):
            yield Check("PyTorch", subject.name, False, told)


def judge_padding_effect(evidence: Evidence) -> Iterator[Check]:
    """Say so where the model itself depends on padding, in float64."""
    effects = [s.padding_effect for s in evidence.subjects if s.padding_effect is not None]
    if effects:
        name, effect = type(evidence.base.model).__name__, max(effects)
        how = f"changes an output by up to {effect:.3g}"
        if not np.isfinite(effect):
            how = "makes rows run that do not run alone"
        detail = (
            f"{name} depends on padding by itself: in float64 it {how}. So padded batches are "
            "compared with PyTorch on the same padded batches, and the case padding is left out"
        )
        yield Check("PyTorch", "all", True, detail)


@dataclass(frozen=True)
class _Case:
    """An output whose reference errs too much, in the batch where it errs most."""

    evidence: Evidence
    subject: Subject
    adapter: Adapter
    errors: OutputErrors
    batch: int = 0

    @classmethod
    def of(cls, evidence: Evidence, subject: Subject, errors: OutputErrors) -> "_Case":
        """An output of a state, in the first batch."""
        states = states_of(evidence.artifact, evidence.base, evidence.adapters, ())
        adapter = next(state.attach for state in states if state.name == subject.name)
        return cls(evidence, subject, adapter, errors)

    @property
    def inputs(self) -> Tensors:
        return self.evidence.batches[self.batch]

    @property
    def dtype(self) -> str:
        return self.evidence.artifact.manifest.dtype

    def compute(self, question: Question, dtype: str) -> Any:
        work = Work(self.adapter, question.items)
        (found,) = self.evidence.compute(self.evidence.base, [work], getattr(torch, dtype))
        return question.read(found)

    def distances(self, outputs: Tensors, truth: Tensors | None = None) -> Array:
        """Absolute distances from the truth, by default the oracle; 0 at hidden positions."""
        name, oracle = self.errors.output, self.subject.oracle
        hidden = hidden_positions(name, self.evidence.batches, oracle)[self.batch]
        found = differences(outputs[name], (truth or oracle[self.batch])[name])
        distances: Array = np.where(hidden, 0.0, found)
        return distances


def _excess(errors: OutputErrors) -> float:
    """How many times the error is what rounding explains; infinite for NaN."""
    excess = errors.reference_error / errors.explained if errors.explained else np.inf
    return np.inf if np.isnan(excess) else excess


def _condemn(evidence: Evidence, subject: Subject, errors: OutputErrors) -> Check:
    first = _Case.of(evidence, subject, errors)
    case = max(
        (replace(first, batch=number) for number in range(len(evidence.batches))),
        key=lambda one: _largest(one.distances(subject.reference[one.batch])),
        default=first,
    )
    explained, scale = errors.explained or 0.0, errors.scale
    detail = (
        f"{errors.output}: PyTorch itself errs by {errors.reference_error:.3g} in {case.dtype}, "
        f"where the largest value is {scale:.3g} and at most {explained:.3g} can be judged. "
        f"{_cause(case)}"
    )
    return Check("PyTorch", subject.name, False, detail)


def _cause(case: _Case) -> str:
    model = case.evidence.base.model
    name = type(model).__name__
    cast_(model, getattr(torch, case.dtype))
    if weight := _infinite_weight(model):
        return f"{name} overflows in {case.dtype}: its weight {weight} is not finite. {_REMEDY}"
    if procedure := _other_function(case):
        return f"{name} gives another function {procedure}, in float64 too"
    row = int(np.argmax(_by_row(case.distances(case.subject.reference[case.batch]))))
    item = row_alone(case.evidence.base, case.inputs, row)
    exact, found = (_outputs_of_modules(case, item, each) for each in ("float64", case.dtype))
    if path := _first_overflow(exact, found):
        return f"{name} overflows in {case.dtype}, first in {path}. {_REMEDY}"
    if told := _told_of_ties(case):
        return told
    place = _largest_jump(exact, found, case)
    return f"{name} is unstable in {case.dtype}{place}. {_REMEDY}"


def _told_of_ties(case: _Case) -> str | None:
    """Where experts are level but for rounding, in words; None for a model without such ties."""
    base, routers = case.evidence.base, routers_of(case.evidence.base.model)
    if not routers:
        return None
    rows = [
        row_alone(base, batch, int(row))
        for batch in case.evidence.batches
        for row in np.flatnonzero(~hidden_rows(batch))
    ]
    exact, own = (
        [_of_routers(routers, _outputs_of_modules(case, item, dtype)) for item in rows]
        for dtype in ("float64", case.dtype)
    )
    ties = first_ties(routers, zip(exact, own, strict=True))
    if ties is None:
        return None
    name = type(base.model).__name__
    return (
        f"{name} is unstable in {case.dtype}: in {ties.path}, rounding chooses the experts of "
        f"{ties.tied} of {ties.tokens} tokens, so that a right artifact may choose others than "
        f"PyTorch.{'' if case.dtype == 'float32' else ' Export in float32.'}"
    )


def _of_routers(
    routers: Collection[str], outputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The outputs that are needed of each row; those of all modules would fill the memory."""
    return {path: values for path, values in outputs.items() if path in routers}


def _other_function(case: _Case) -> str | None:
    """The first way to run the inputs that in float64 is too far from rows alone already.

    Both are computed anew: the weights may have been rounded since the truth was.
    """
    base, batch = case.evidence.base, case.inputs
    truth = _rows_alone(case)
    for procedure, question in own_procedures(base, batch).items():
        (outputs,) = case.compute(question, "float64")
        if not _largest(case.distances(outputs, truth)) <= (case.errors.explained or 0.0):
            return procedure
    return None


def _rows_alone(case: _Case) -> Tensors:
    base, batches = case.evidence.base, [case.inputs]
    try:
        (truth,) = case.compute(outputs_in_float64(base, batches, together=True), "float64")
    except PaddingChangesRowsError:
        (truth,) = case.compute(outputs_in_float64(base, batches, together=False), "float64")
    found: Tensors = truth
    return found


def _largest(values: Array) -> float:
    """The largest; infinite where one is not a number."""
    return float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max(initial=0))


def _by_row(distances: Array) -> Array:
    flat = np.nan_to_num(distances, nan=np.inf, posinf=np.inf).reshape(len(distances), -1)
    largest: Array = flat.max(axis=1)
    return largest


def _infinite_weight(model: nn.Module) -> str | None:
    names = (name for name, value in model.named_parameters() if not value.isfinite().all())
    return next(names, None)


def _outputs_of_modules(case: _Case, item: Item, dtype: str) -> dict[str, torch.Tensor]:
    """What every module returns first, by path, in the order in which modules finish."""
    with _recorded(case.evidence.base.model) as outputs:
        case.compute(Question([item], lambda found: found), dtype)
    return outputs


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Let every module keep its first output, float64 on the CPU, by path.

    The hook that keeps it is added when the module is first called, behind those of an adapter, so
    that outputs are scaled.
    """
    outputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:

        def keep(path: str, module: nn.Module, arguments: Any, output: Any) -> None:
            del module, arguments
            tensor = _first_tensor(output)
            if tensor is not None and path not in outputs:
                outputs[path] = tensor.detach().to("cpu", torch.float64)

        def begin(path: str, known: set[str], module: nn.Module, arguments: Any) -> None:
            del arguments
            if path not in known:
                known.add(path)
                hooks.callback(module.register_forward_hook(partial(keep, path)).remove)

        known: set[str] = set()
        for path, module in model.named_modules():
            if path:
                hook = module.register_forward_pre_hook(partial(begin, path, known))
                hooks.callback(hook.remove)
        yield outputs


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, dict) else output
    parts = values if isinstance(output, (dict, tuple, list)) else ()
    return next((found for found in map(_first_tensor, parts) if found is not None), None)


def _first_overflow(exact: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str | None:
    for path, values in found.items():
        if path not in exact or exact[path].shape != values.shape:
            continue
        # What a model sets to infinity itself, as a mask, is so in float64 too.
        if bool((~values.isfinite() & exact[path].isfinite()).any()):
            return path
    return None


def _largest_jump(
    exact: dict[str, torch.Tensor], found: dict[str, torch.Tensor], case: _Case
) -> str:
    """Where the relative error is most times that of all modules before; in words."""
    before = UNIT_ROUNDOFF[case.dtype]
    jumps: list[tuple[float, str, float, float]] = []
    for path, values in found.items():
        if path in exact and exact[path].shape == values.shape and values.numel():
            size = float(np.abs(without_ruled_out(exact[path].numpy())).max())
            error = float(differences(values.numpy(), exact[path].numpy()).max()) / (size or 1.0)
            jumps.append((error / before, path, before, error))
            before = max(before, error)
    if not jumps:
        return ""
    _, path, earlier, error = max(jumps)
    return f": its relative error jumps from {earlier:.2g} to {error:.2g} in {path}"
