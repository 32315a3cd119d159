"""`make mutation`: plant mistakes, judge them, write the table; exit code 1 if the gate fails.

Without options every kind of mistake is planted in six places, as different as there are, and
clean artifacts are judged 1,000 times.
"""

import argparse
import sys
import time
from pathlib import Path

from mutation.report import LIMIT, Score, write_json, write_table
from mutation.results import CLEAN, Results, Run
from mutation.running import Plan, run_all
from mutation.toys import ARCHITECTURES, PRECISIONS, TOYS

_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the command; returns its exit code."""
    options = _options()
    plan = _plan(options)
    results = Results(plan.root)
    if options.report and not results.is_current:
        print("These results were made by other sources than those of now.")
    began = time.monotonic()
    for count, run in enumerate(() if options.report else run_all(plan, results), 1):
        _tell(run)
        if count % 50 == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"{count} runs in {minutes:.0f} minutes", flush=True)
    score = Score(list(results.runs.values()), results.about)
    write_json(score, _ROOT / "build" / "mutation.json")
    if not options.kinds and len(plan.toys) == len(TOYS):
        write_table(score, _ROOT / "docs" / "parity.md")
    print(score.summary())
    return 0 if score.passed else 1


def _tell(run: Run) -> None:
    """Say what fails the gate, as soon as it is known."""
    if run.kind == CLEAN and run.outcome != "passed":
        print(f"FALSE ALARM {run.toy}, seed {run.place}: {run.detail}", flush=True)
    elif run.outcome in ("passed", "crashed") and run.moved > LIMIT:
        what = f"{run.kind}, {run.place}: {run.moved:.3g} times, {run.where}"
        print(f"MISSED ({run.outcome}) {run.toy}: {what} {run.detail}", flush=True)


def _plan(options: argparse.Namespace) -> Plan:
    toys = [
        toy
        for toy in TOYS
        if toy.architecture in options.architecture
        and toy.dtype in options.precision
        and (not options.artifact or any(part in toy.name for part in options.artifact))
    ]
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    return Plan(
        options.build.resolve(),
        toys,
        tuple(options.kinds),
        places=options.places or (1 if options.all else 6),
        everywhere=options.all,
        clean=options.clean,
        seed=options.seed,
        until=until,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=[], help="parts of the names of kinds")
    parser.add_argument(
        "--architecture", nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES
    )
    parser.add_argument("--precision", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--artifact", nargs="*", default=[], help="parts of the names of artifacts")
    parser.add_argument("--all", action="store_true", help="every kind in every artifact")
    parser.add_argument(
        "--places",
        type=int,
        help="places of each kind (default: 6), with --all in each artifact (default: 1)",
    )
    parser.add_argument("--clean", type=int, default=1000, help="runs of clean artifacts")
    parser.add_argument("--minutes", type=float, help="begin no run after this time")
    parser.add_argument("--seed", type=int, default=0, help="for the choice of places")
    parser.add_argument("--report", action="store_true", help="only the results that there are")
    parser.add_argument("--build", type=Path, default=_ROOT / "build" / "mutation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
