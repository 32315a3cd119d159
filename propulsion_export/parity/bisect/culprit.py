"""Decide from the numbers of all modules which one is the first to be wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from propulsion_export.parity.bisect.matching import Pooled, Target
from propulsion_export.parity.bisect.modules import Call


@dataclass(frozen=True)
class Culprit:
    """The module to blame, and how it is known.

    Attributes:
        call: the module.
        between: None if the module's own output is wrong; else the call inside it whose input is
            the first wrong value.
        target: the numbers of the wrong value.
        scaled_from: the numbers before the multiply by the module's scale; None without a scale.
    """

    call: Call
    between: Call | None
    target: Target
    scaled_from: Target | None


def find_culprit(pooled: Pooled, dtype: str) -> Culprit | None:
    """The first module that leaves its tolerance while what it reads is within.

    A module whose output is expected at a place of the graph is wrong if no value there is within
    the tolerance. One without a place is only known to be right if some value is its output.

    Returns:
        None if all that can be judged is right.
    """
    return _Verdicts(pooled, dtype).culprit()


class _Verdicts:
    """What is known of each call, in the order in which they returned."""

    def __init__(self, pooled: Pooled, dtype: str) -> None:
        self.pooled = pooled
        self._dtype = dtype
        self.order = list(pooled.targets)
        self.right = {call: self._is_met(call, "output") for call in self.order}
        self.reads_right = {call: self._is_met(call, "read") for call in self.order}

    def _is_met(self, call: Call, part: str) -> bool:
        target = self.pooled.targets[call].get(part)  # type: ignore[call-overload]
        return target is None or target.is_met(self._dtype)

    def culprit(self) -> Culprit | None:
        placed = [c for c in self.order if self.pooled.targets[c]["output"].own]
        wrong = next((call for call in placed if not self.right[call]), None)
        if wrong is None:
            return self._behind_all(placed)
        if self.reads_right[wrong]:
            return self._itself(wrong)
        around = self._around(wrong)
        suspects = self._suspects(wrong, around, placed)
        return self._itself(suspects[0]) if suspects else self._within(around, wrong)

    def _behind_all(self, placed: Sequence[Call]) -> Culprit | None:
        """The first unmatched module behind those with a place, if the outputs are wrong."""
        if all(self.right[call] for call in self.order[-1:]):
            return None
        start = max((self.order.index(call) for call in placed), default=-1)
        behind = [c for c in self.order[start + 1 :] if not self.right[c] and self.reads_right[c]]
        return self._itself(behind[0]) if behind else None

    def _around(self, wrong: Call) -> Call | None:
        """The innermost module around a call whose own input is right."""
        around = [c for c in self.order if c[0] != wrong[0] and _is_inside(wrong[0], c[0])]
        right = [call for call in around if self.reads_right[call]]
        return max(right, key=lambda call: len(call[0]), default=None)

    def _suspects(self, wrong: Call, around: Call | None, placed: Sequence[Call]) -> list[Call]:
        """Unmatched modules with right inputs that ran between what is right and what is wrong."""
        end = self.order.index(wrong)
        before = [self.order.index(call) for call in placed if self.right[call]]
        start = max((place for place in before if place < end), default=-1)
        read = self.pooled.targets[wrong]["read"]
        return [
            call
            for place, call in enumerate(self.order[:end])
            if not self.right[call] and self.reads_right[call]
            if around is None or _is_inside(call[0], around[0])
            if place > start or self.pooled.targets[call]["output"].size == read.size
        ]

    def _itself(self, call: Call) -> Culprit:
        targets = self.pooled.targets[call]
        return Culprit(call, None, targets["output"], targets.get("unscaled"))

    def _within(self, around: Call | None, wrong: Call) -> Culprit:
        target = self.pooled.targets[wrong]["read"]
        return Culprit(around or wrong, wrong, target, None)


def _is_inside(path: str, around: str) -> bool:
    return not around or path.startswith(f"{around}.")
