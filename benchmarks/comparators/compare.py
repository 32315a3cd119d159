"""Plant the same mistakes for every comparator, and write the table of docs/parity.md.

    python benchmarks/comparators/compare.py [--work build/comparators] [--only TEXT]
        [--subject TEXT] [--tool NAME] [--write]

Toys, an encoder and a decoder with its cache, are exported rightly in float32 and in float16, and
once with each mistake. Every comparator gets the same graphs, in an environment of its own that pip
makes below `--work`, with its own tolerances, and PyTorch with the right adapter folded as its
reference. `--write` puts the tables between the markers in docs/parity.md; without it they are
printed. What was said of every graph is in results.json below `--work`, which keeps what a call
with `--subject` leaves out.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from plants import PLANTS, Plant
from subjects import KINDS, Subject, Tensors, make_subject, reference_runs
from tools import TOOLS, EnvironmentMissingError, Outcome

from propulsion_export.environment.quiet import quiet

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- begin: beside the others -->\n", "<!-- end: beside the others -->\n"
DTYPES = ("float32", "float16")
RESULTS = "results.json"


@dataclass(frozen=True)
class Judged:
    """One graph: the mistake in it, how far it moves an output, and what each tool says."""

    kind: str
    dtype: str
    plant: str
    moved: float
    outcomes: dict[str, Outcome]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/comparators"))
    parser.add_argument("--only", default="", help="plant only mistakes whose name has this")
    parser.add_argument("--tool", action="append", help="ask only this comparator; repeatable")
    parser.add_argument("--subject", default="", help="judge only toys whose name has this")
    parser.add_argument("--write", action="store_true", help="into docs/parity.md")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    plants = [plant for plant in PLANTS if plant.name == "clean" or options.only in plant.name]
    tools = [tool for tool in TOOLS if not options.tool or tool.name in options.tool]
    for dtype in DTYPES:
        for kind in KINDS:
            if options.subject in f"{kind} {dtype}":
                with quiet():
                    found = judge(kind, dtype, work, [p for p in plants if kind in p.kinds], tools)
                keep(work / RESULTS, found)
    judged = read(work / RESULTS)
    text = "\n".join(table(kind, judged) for kind in KINDS)
    if options.write:
        write(text)
    else:
        print(text)


def keep(file: Path, found: Sequence[Judged]) -> None:
    """Put what was found of one toy into the file, in the place of what it had of it."""
    toy = (found[0].kind, found[0].dtype)
    others = [one for one in read(file) if (one.kind, one.dtype) != toy]
    file.write_text(json.dumps([asdict(one) for one in (*others, *found)], indent=1))


def read(file: Path) -> list[Judged]:
    if not file.exists():
        return []
    return [
        Judged(
            **one | {"outcomes": {tool: Outcome(**said) for tool, said in one["outcomes"].items()}}
        )
        for one in json.loads(file.read_text())
    ]


def judge(
    kind: str, dtype: str, work: Path, plants: Sequence[Plant], tools: Sequence
) -> list[Judged]:
    root = work / f"{kind}-{dtype}"
    shutil.rmtree(root, ignore_errors=True)
    subject = make_subject(kind, dtype, root)
    graphs = [root / "planted" / str(number) for number in range(len(plants))]
    for plant, graph in zip(plants, graphs, strict=True):
        plant.make(subject, graph)
    said = {tool.name: outcomes(tool, subject, graphs, work) for tool in tools}
    runs = [inputs for inputs, _ in reference_runs(subject)]
    right = outputs(subject.clean, runs)
    return [
        Judged(
            kind,
            dtype,
            plant.name,
            distance(right, outputs(graph, runs)),
            {name: each[number] for name, each in said.items()},
        )
        for number, (plant, graph) in enumerate(zip(plants, graphs, strict=True))
    ]


def outcomes(tool, subject: Subject, graphs: Sequence[Path], work: Path) -> list[Outcome]:
    """What a tool says of each graph, the first of which is right.

    Where it condemns that one, what it says of the others means nothing, and it is not asked.
    """
    print(f"{subject.name}: {tool.name}", file=sys.stderr, flush=True)
    try:
        (clean,) = tool.judge(subject, graphs[:1], work)
        if clean.agrees:
            return [clean, *tool.judge(subject, graphs[1:], work)]
    except EnvironmentMissingError as error:
        clean = Outcome(None, None, str(error))
    return [clean, *[Outcome(None, None, clean.said)] * (len(graphs) - 1)]


def outputs(graph: Path, runs: Sequence[Tensors]) -> list[Tensors]:
    session = onnxruntime.InferenceSession(str(graph / "model.onnx"))
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(feeds)), strict=True)) for feeds in runs]


def distance(right: Sequence[Tensors], found: Sequence[Tensors]) -> float:
    """Largest change of an output, over its largest value; infinite where it is lost or NaN."""
    shares = [0.0]
    for before, after in zip(right, found, strict=True):
        for name, values in before.items():
            other = after.get(name)
            if other is None or other.shape != values.shape:
                return np.inf
            change = np.abs(values.astype(np.float64) - other.astype(np.float64)).max()
            shares.append(change / np.abs(values.astype(np.float64)).max())
    return float(np.nan_to_num(max(shares), nan=np.inf)) if not np.isnan(shares).any() else np.inf


def table(kind: str, judged: Sequence[Judged]) -> str:
    """The mistakes in one kind of model, in Markdown: a column for each tool and dtype."""
    cells = {(one.plant, one.dtype): one for one in judged if one.kind == kind}
    if not cells:
        return ""
    tools = list(next(iter(cells.values())).outcomes)
    dtypes = [dtype for dtype in DTYPES if ("clean", dtype) in cells]
    columns = [(tool, dtype) for tool in tools for dtype in dtypes]
    names = list(dict.fromkeys(plant for plant, _ in cells))
    head = [f"mistake in the {kind}", "moves outputs by", *(f"{t}, {d}" for t, d in columns)]
    rows = [
        [
            name,
            ", ".join(share(cells[name, dtype].moved) for dtype in dtypes),
            *(word(cells, name, tool, dtype) for tool, dtype in columns),
        ]
        for name in names
    ]
    lines = [head, ["---"] * len(head), *rows, ["caught", "", *counts(cells, columns)]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def word(cells: dict[tuple[str, str], Judged], name: str, tool: str, dtype: str) -> str:
    outcome = cells[name, dtype].outcomes[tool]
    if outcome.agrees is None:
        return "-"
    words = ("caught", "passed") if name != "clean" else ("false alarm", "passed")
    return f"{words[outcome.agrees]}, {outcome.code}"


def counts(cells: dict[tuple[str, str], Judged], columns: Sequence[tuple[str, str]]) -> list[str]:
    """How many mistakes each has caught of those that it was given."""
    found = []
    for tool, dtype in columns:
        said = [
            one.outcomes[tool].agrees
            for (plant, kind), one in cells.items()
            if kind == dtype and plant != "clean"
        ]
        given = [agrees for agrees in said if agrees is not None]
        found.append(f"{given.count(False)} of {len(given)}" if given else "-")
    return found


def share(moved: float) -> str:
    return "all" if np.isinf(moved) else f"{moved:.0e}"


def write(text: str) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
