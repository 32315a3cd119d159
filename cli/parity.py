"""`propulsion-export parity`: the verdict on an artifact."""

from pathlib import Path
from typing import Any

import click

from .console import Console, console_options
from .options import DIRECTORY, FILE, model_option, runner_option, trust_option
from .verdict import exit_code, verdict_line


@click.command(
    epilog="\b\nExample: propulsion-export parity onnx/switchable --report parity/switchable "
    "--junit parity.xml"
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@model_option
@click.option(
    "-a", "--adapter", multiple=True, metavar="NAME=DIR", help="Where an adapter lies now."
)
@runner_option
@click.option("--inputs", type=FILE, help="Texts to compare on, .txt or .jsonl.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the inputs made.",
)
@click.option("--report", type=DIRECTORY, help="Directory for parity.json and parity.html.")
@click.option("--junit", type=FILE, help="JUnit XML for a CI.")
@click.option("--force", is_flag=True, help="Replace an earlier report.")
@trust_option
@console_options
def command(console: Console, artifact: Path, junit: Path | None, **options: Any) -> int:
    """The verdict: does an artifact compute what PyTorch computes?

    The oracle is the base model with the adapter in float64; an artifact may err at most 4 times as
    much as PyTorch itself does at its precision. Exit 0 passed, 1 failed, 3 nothing could be run.
    """
    from propulsion_export.artifacts.staging import check_replaceable_file, replace_file
    from propulsion_export.parity.reports.junit import to_junit
    from propulsion_export.pipeline.parity import check_parity

    if junit is not None:
        check_replaceable_file(junit, holds=b"<testsuite")
    with console.progress() as progress:
        report = check_parity(artifact, progress=progress, **options)
    if junit is not None:
        replace_file(junit, to_junit(report).encode())
    import json

    rows = [
        (check.case, check.adapter, "passed" if check.passed else "FAILED", check.detail)
        for check in report.checks
    ]
    table = console.table(("case", "adapter", "verdict", "detail"), rows) + "\n" if rows else ""
    console.result(json.loads(report.to_json()), table + verdict_line(report))
    return exit_code(report)
