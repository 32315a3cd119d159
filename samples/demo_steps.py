"""What both halves of the demo share: run a command and show it, judge an artifact."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from propulsion_export.cli.console import human_size, size_of

OUTPUT = Path("demo-output")
DATA = Path(__file__).parent / "data"

Row = tuple[str, str, str, str, str]


def step(title: str, *arguments: str, may_not_run: bool = False) -> dict:
    """Print a command, run it, and return its JSON output."""
    print(f"\n== {title}\n$ propulsion-export {shlex.join(arguments)}", flush=True)
    program = Path(sys.executable).with_name("propulsion-export")
    done = subprocess.run(
        [str(program), *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in ((0, 3) if may_not_run else (0,)):
        sys.exit(f"the command ended with {done.returncode}: {done.stdout}")
    return json.loads(done.stdout)


def judge(artifact: str, *options: str) -> Row:
    """The verdict on an artifact, as a row of the final table."""
    report = step(
        f"The verdict on {artifact}",
        *("parity", f"{OUTPUT}/{artifact}", "--report", f"{OUTPUT}/parity/{artifact}", *options),
        may_not_run=True,
    )
    ran = f"{report['verdict']}: {len(report['checks'])} checks in {report['runner']}"
    if report["verdict"] == "not run":
        ran = "; ".join(f"not run: {item['reason']}" for item in report["not_run"])
    margin = "-" if report["margin"] is None else f"{report['margin']:.0%} left"
    page = f"{OUTPUT}/parity/{artifact}/parity.html"
    return artifact, human_size(size_of(OUTPUT / artifact)), margin, ran, page
