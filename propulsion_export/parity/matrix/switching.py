"""An adapter computes the same whichever came before it, bit for bit."""

from collections.abc import Iterator, Mapping, Sequence

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.matrix.probe import Probe, changed
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.subject import Subject


def check_switching(
    states: Sequence[Subject], probe: Probe, before: Mapping[str, Tensors]
) -> Iterator[Check]:
    """Check every adapter after another one and after the base model, and these after it.

    A generative model also generates with both in turns of one token, each with its own cache.

    Args:
        states: the adapters, and the base model if it can be run.
        probe: runs them.
        before: what each of them returned before, by name.
    """
    base = [state for state in states if state.name == BASE_NAME]
    adapters = [state for state in states if state.name != BASE_NAME]
    for place, state in enumerate(adapters):
        others = [*adapters[place - 1 :][:1], *base] if len(adapters) > 1 else base
        if others:
            findings = [one for other in others for one in _findings(state, other, probe, before)]
            detail = "; ".join(findings) or f"after {_listed(others)} {_UNCHANGED}"
            yield Check("switching", state.name, not findings, detail)


_UNCHANGED = "and these after it: bit for bit as before"


def _findings(
    state: Subject, other: Subject, probe: Probe, before: Mapping[str, Tensors]
) -> Iterator[str]:
    """Outputs that two states change in each other."""
    for each, last in ((other, state), (state, other)):
        if names := changed(before[each.name], probe.run(each.feeds)):
            yield f"{each.name} after {last.name}: {', '.join(names)} changed"
    if callable(probe.candidate):
        return
    taken = probe.take_turns(probe.candidate, [state.feeds, other.feeds])
    for each, found in zip((state, other), taken, strict=True):
        if names := changed(before[each.name], found):
            turns = f"{state.name} and {other.name} in turns"
            yield f"{turns}: {', '.join(names)} of {each.name} changed"


def _listed(states: Sequence[Subject]) -> str:
    return " and after ".join(state.name for state in states)
