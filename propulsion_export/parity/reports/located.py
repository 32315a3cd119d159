"""Where a failing artifact first leaves its tolerance, as a report has it."""

from dataclasses import dataclass
from typing import Literal

Multiply = Literal["wrong", "right", "folded", "none"]


@dataclass(frozen=True)
class Located:
    """The first module whose output is out of tolerance although what it reads is within.

    Attributes:
        case: the case that has failed.
        adapter: the adapter it has failed with; `base` for none.
        graph: the file of the graph that has the module; empty for a checkpoint.
        path: the module's path.
        kind: the module's class.
        reads: `itself`: what the module returns is wrong; otherwise the path of the module inside
            it whose input is the first wrong value, while the modules before it are right.
        error: largest absolute error of the value that is wrong.
        allowed: the largest error that is within the tolerance there.
        reference_error: the largest error of PyTorch at the artifact's precision there.
        multiply: whether the multiply by the adapter's scale is to blame: `wrong`: it is, what it
            reads is right; `right`: what it reads is wrong already; `folded`: the scale is in the
            weights; `none`: the module has no scale.
        channels: how many channels the wrong value has; 0 where no value stands for it.
        channels_off: in how many of them the error exceeds what is allowed.
        worst_channel: the channel with the largest error; None without channels.
        factor: what the candidate's worst channel is the oracle's times, by least squares.
        per_bin: how many neighbouring channels an entry of `channel_errors` stands for.
        channel_errors: the largest error of each channel, or of each bin of them.
        steps: how the graph was run: `in one pass`, or `step by step`.
    """

    case: str
    adapter: str
    graph: str
    path: str
    kind: str
    reads: str
    error: float
    allowed: float
    reference_error: float
    multiply: Multiply = "none"
    channels: int = 0
    channels_off: int = 0
    worst_channel: int | None = None
    factor: float | None = None
    per_bin: int = 1
    channel_errors: tuple[float, ...] = ()
    steps: str = "in one pass"

    def lines(self) -> tuple[str, str]:
        """Two lines for people: where, and how it shows."""
        where = f"{self.path} ({self.kind})" + (f" in {self.graph}" if self.graph else "")
        found = f"error {self.error:.3g}, allowed {self.allowed:.3g}"
        first = f"{self.adapter}: first wrong in {where}: {found}, run {self.steps}"
        if self.reads != "itself":
            return first, (
                f"what it reads is right, and what its part {self.reads} reads is wrong; the "
                "modules before that are right, so the mistake is in what stands between them"
            )
        return first, f"what it reads is right; {self._channels()}{_MULTIPLY[self.multiply]}"

    def _channels(self) -> str:
        if self.worst_channel is None:
            return "no value of the graph is its output"
        times = "" if self.factor is None else f", {self.factor:.4g} times the oracle's"
        return (
            f"{self.channels_off:,} of {self.channels:,} channels are out of tolerance, the worst "
            f"is {self.worst_channel}{times}"
        )


_MULTIPLY = {
    "wrong": "; what the multiply by the scale reads is right, so the scale is wrong",
    "right": "; it is wrong before the multiply by the scale already",
    "folded": "; the scale is folded into the weights",
    "none": "",
}
