"""`make mutation`: plant mistakes, judge them, write the table; exit code 1 if the gate fails."""

import argparse
import os
import sys
from pathlib import Path

from mutation.report import LIMIT, Score, write_json, write_table
from mutation.running import CLEAN, Plan, known_runs, run_all
from mutation.toys import ARCHITECTURES, PRECISIONS, TOYS

_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the command; returns its exit code."""
    options = _options()
    toys = [
        toy
        for toy in TOYS
        if toy.architecture in options.architecture
        and toy.dtype in options.precision
        and (not options.artifact or any(part in toy.name for part in options.artifact))
    ]
    share = options.clean / sum(CLEAN[toy.architecture] for toy in TOYS)
    clean = {name: max(1, round(share * count)) for name, count in CLEAN.items()}
    plan = Plan(
        options.build.resolve(),
        tuple(options.kinds),
        options.places,
        options.artifacts,
        clean if options.clean else dict.fromkeys(CLEAN, 0),
        options.seed,
    )
    runs = []
    found = known_runs(plan, toys) if options.report else run_all(plan, toys, options.jobs)
    for run in found:
        runs.append(run)
        if run.kind == "clean" and run.outcome != "passed":
            print(f"FALSE ALARM {run.toy}, seed {run.place}: {run.detail}", flush=True)
        if run.outcome in ("passed", "crashed") and run.moved > LIMIT:
            what = f"{run.kind}, {run.place}: {run.moved:.3g} times, {run.where}"
            print(f"MISSED ({run.outcome}) {run.toy}: {what} {run.detail}", flush=True)
    score = Score(runs)
    write_json(score, _ROOT / "build" / "mutation.json")
    if not (options.kinds or options.artifact) and len(toys) == len(TOYS):
        write_table(score, _ROOT / "docs" / "parity.md")
    print(score.summary())
    return 0 if score.passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=[], help="parts of the names of kinds")
    parser.add_argument(
        "--architecture", nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES
    )
    parser.add_argument("--precision", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--artifact", nargs="*", default=[], help="parts of the names of artifacts")
    parser.add_argument("--places", type=int, default=1, help="places of a kind in an artifact")
    parser.add_argument("--artifacts", type=int, default=2, help="of an architecture and precision")
    parser.add_argument("--report", action="store_true", help="only the results that there are")
    parser.add_argument("--clean", type=int, default=1000, help="runs of clean artifacts")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--seed", type=int, default=0, help="for the choice of places")
    parser.add_argument("--build", type=Path, default=_ROOT / "build" / "mutation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
