"""`propulsion-export export`: the road in one go."""

from pathlib import Path
from typing import Any

import click

from .console import Console, console_options
from .options import (
    adapters_option,
    dtype_option,
    mode_option,
    model_option,
    output_options,
    runtime_option,
    target_option,
    task_option,
    trust_option,
)
from .verdict import exit_code, verdict_line


@click.command(
    epilog="\b\nExample: propulsion-export export -a topic=adapters/topic --mode switchable "
    "-o release"
)
@model_option
@adapters_option
@mode_option
@task_option
@dtype_option
@runtime_option
@target_option
@click.option("--no-engine", is_flag=True, help="Stop after the ONNX graph.")
@output_options
@trust_option
@console_options
def command(
    console: Console,
    adapter: tuple[str, ...],
    output: Path,
    runtime: Any,
    targets: tuple[str, ...],
    no_engine: bool,
    **options: Any,
) -> int:
    """The road in one go: adapters in; ONNX, engine and parity reports out.

    Exit 1 when a comparison failed, 3 when the engine asked for could not be built here.
    """
    from propulsion_export.engine import BuildOptions
    from propulsion_export.pipeline.export import export

    engine = None if no_engine else BuildOptions(runtime=runtime, targets=targets)
    with console.progress() as progress:
        road = export(adapter, output, engine=engine, progress=progress, **options)
    lines = [f"{output}/{name}: {verdict_line(report)}" for name, report in road.reports.items()]
    if road.engine_missing:
        lines.append(f"{output}/engine: not built ({road.engine_missing})")
    console.result(
        {
            "output": str(output),
            "parity": {name: report.verdict for name, report in road.reports.items()},
            "engine": None if road.engine is None else str(road.engine.directory),
            "engine_missing": road.engine_missing,
        },
        "\n".join(lines),
    )
    failed = any(exit_code(report) == 1 for report in road.reports.values())
    return 1 if failed else 3 if road.engine_missing else 0
