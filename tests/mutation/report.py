"""The tables of kinds and of artifacts, and the gate."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mutation.results import CLEAN, Run
from mutation.running import KINDS
from mutation.toys import TOYS

# In times of what parity allows: twice that is beyond doubt, since a right artifact may be wrong by
# it in the other direction, and a larger sample of inputs finds errors about twice as large.
LIMIT = 4.0
BEGIN, END = "<!-- mutation: begin -->", "<!-- mutation: end -->"
_SEEN = ("caught", "refused", "not run")
_PLANTED = (*_SEEN, "crashed", "passed")


@dataclass(frozen=True)
class Score:
    """What all runs together show.

    Attributes:
        runs: all of them.
        about: see `Results.about`.
    """

    runs: Sequence[Run]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def planted(self) -> list[Run]:
        """The mistakes that were planted and judged."""
        return [run for run in self.runs if run.kind != CLEAN and run.outcome in _PLANTED]

    @property
    def visible(self) -> list[Run]:
        """Those that move an output by more than the limit."""
        return [run for run in self.planted if run.moved > LIMIT]

    @property
    def missed(self) -> list[Run]:
        """Those of them that passed, or that parity had no verdict on because of a bug."""
        return [run for run in self.visible if run.outcome not in _SEEN]

    @property
    def clean(self) -> list[Run]:
        """The runs without a mistake."""
        return [run for run in self.runs if run.kind == CLEAN]

    @property
    def false_alarms(self) -> list[Run]:
        """Those of them that did not pass."""
        return [run for run in self.clean if run.outcome != "passed"]

    @property
    def passed(self) -> bool:
        """Whether every visible mistake was seen, and no clean artifact condemned."""
        return not self.missed and not self.false_alarms

    def summary(self) -> str:
        """The result in a few lines."""
        outcomes = Counter(run.outcome for run in self.visible)
        found = ", ".join(f"{outcomes[each]} {each}" for each in _PLANTED if outcomes[each])
        kinds = {run.kind for run in self.planted}
        return (
            f"{len(self.planted)} mistakes of {len(kinds)} kinds were planted, in "
            f"{len({run.toy for run in self.planted})} of {len(TOYS)} artifacts. "
            f"{len(self.visible)} of them move an output by more than {LIMIT:g} times what is "
            f"allowed: {found or 'none'}. "
            f"{len(self.false_alarms)} false alarms in {len(self.clean)} runs of "
            f"{len({run.toy for run in self.clean})} clean artifacts. "
            f"{self._cost()}{self._made_by()}"
        )

    def _cost(self) -> str:
        minutes = [sum(run.all_seconds for run in runs) / 60 for runs in (self.planted, self.clean)]
        return "It took {:.0f} and {:.0f} minutes of one core.".format(*minutes)

    def _made_by(self) -> str:
        """The commit and the packages, where they are known."""
        if not self.about:
            return ""
        named = ("python", "torch", "transformers", "onnxruntime", "onnx")
        tools = self.about["tools"]
        versions = ", ".join(f"{name} {tools[name]}" for name in named if name in tools)
        return f" Run on commit {self.about['commit']}, with {versions}."


def write_json(score: Score, file: Path) -> None:
    """Write all runs and the result."""
    value = {
        "limit": LIMIT,
        "about": dict(score.about),
        "summary": score.summary(),
        "passed": score.passed,
        "planted": len(score.planted),
        "visible": len(score.visible),
        "missed": [_finite(run) for run in score.missed],
        "false_alarms": [_finite(run) for run in score.false_alarms],
        "clean": len(score.clean),
        "runs": [_finite(run) for run in score.runs],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_table(score: Score, file: Path) -> None:
    """Put the table between its two marker comments in a Markdown file.

    Raises:
        ValueError: the file does not have them.
    """
    text = file.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{file}: has no {BEGIN} and {END}, expected both")
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    file.write_text(f"{before}{BEGIN}\n{table(score)}\n{END}{behind}", encoding="utf-8")


def table(score: Score) -> str:
    """Kinds by precisions as Markdown: caught of planted, and the smallest caught."""
    names = {run.precision for run in score.planted}
    order = ("float32", "float16", "bfloat16", "int4", "int8")
    precisions = [name for name in order if name in names]
    head = ["kind of mistake", *precisions, "smaller ones", "smallest caught"]
    lines = [score.summary(), "", _line(head), _line(["---"] * len(head))]
    by_kind = defaultdict(list)
    for run in score.planted:
        by_kind[run.kind].append(run)
    for kind in KINDS:
        runs = by_kind[kind.name]
        visible = [run for run in runs if run.moved > LIMIT]
        cells = [_caught(run for run in visible if run.precision == each) for each in precisions]
        smaller = _caught(run for run in runs if run.moved <= LIMIT)
        lines.append(_line([kind.name, *cells, smaller, _smallest(runs)]))
    return "\n".join([*lines, "", *_sizes(score, precisions), "", *_artifacts(score)])


def _artifacts(score: Score) -> list[str]:
    """What was planted in each artifact, its clean runs, and the seconds of one verdict."""
    head = ["artifact", "caught of visible", "smaller ones", "clean runs passed", "a clean verdict"]
    lines = [_line(head), _line(["---"] * len(head))]
    for toy in TOYS:
        planted = [run for run in score.planted if run.toy == toy.name]
        clean = [run for run in score.clean if run.toy == toy.name]
        passed = sum(run.outcome == "passed" for run in clean)
        seconds = f"{sum(run.seconds for run in clean) / len(clean):.1f} s" if clean else "-"
        cells = [
            _caught(run for run in planted if run.moved > LIMIT),
            _caught(run for run in planted if run.moved <= LIMIT),
            f"{passed}/{len(clean)}" if clean else "-",
        ]
        lines.append(_line([toy.name, *cells, seconds]))
    return lines


def _sizes(score: Score, precisions: Sequence[str]) -> list[str]:
    """The smallest size caught of each sized mistake, by precision."""
    caught: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in score.planted:
        if run.size is not None and run.outcome in _SEEN:
            caught[_stem(run.kind), run.precision].append(run.size)
    lines = [_line(["smallest size caught", *precisions]), _line(["---"] * (1 + len(precisions)))]
    for stem in dict.fromkeys(_stem(kind.name) for kind in KINDS if kind.size is not None):
        sizes = [caught[stem, each] for each in precisions]
        lines.append(_line([stem, *(f"{min(each):.1%}" if each else "-" for each in sizes)]))
    return lines


def _stem(kind: str) -> str:
    """The name of a sized kind without its size."""
    return kind.rpartition(" ")[0]


def _caught(runs: Iterable[Run]) -> str:
    found = list(runs)
    if not found:
        return "-"
    return f"{sum(run.outcome in _SEEN for run in found)}/{len(found)}"


def _smallest(runs: Sequence[Run]) -> str:
    """The smallest movement that was caught, in times of what is allowed."""
    moved = [run.moved for run in runs if run.outcome in _SEEN and math.isfinite(run.moved)]
    return f"{min(moved):.2g}" if moved else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _finite(run: Run) -> dict[str, object]:
    """A run as JSON has it: no infinity."""
    values = asdict(run)
    return {
        n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()
    }
