"""`propulsion-export export`: adapters in; ONNX graph, engine and parity reports out."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from propulsion_export.environment.waiting import let_threads_sleep

from .console import Console, console_options
from .options import (
    dtype_option,
    mode_option,
    model_option,
    output_options,
    runtime_option,
    target_option,
    task_option,
    trust_option,
)
from .verdict import exit_code

if TYPE_CHECKING:
    from propulsion_export.artifacts.manifest import Mode
    from propulsion_export.engine import BuildOptions
    from propulsion_export.pipeline.export import ExportResult

_Runtime = Literal["auto", "tensorrt", "tensorrt-rtx"]


@click.command(
    epilog="\b\nExample: propulsion-export export -a topic=adapters/topic --mode switchable "
    "-o release"
)
@model_option
@click.option(
    "-a",
    "--adapter",
    multiple=True,
    required=True,
    metavar="[NAME=]DIR",
    help="Adapter directory; repeatable.",
)
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
    *,
    model: str | None,
    adapter: tuple[str, ...],
    mode: "Mode",
    task: str,
    dtype: str,
    runtime: _Runtime | None,
    targets: tuple[str, ...],
    no_engine: bool,
    output: Path,
    force: bool,
    trust_remote_code: bool,
) -> int:
    """Do all in one: adapters in; ONNX graph, engine and parity reports out.

    Exit 1: a comparison failed; 3: the engine could not be built on this machine.
    """
    let_threads_sleep()  # before torch is loaded
    from propulsion_export.pipeline.export import export

    engine = _engine(runtime, targets, no_engine=no_engine)
    with console.progress() as progress:
        exported = export(
            adapter,
            output,
            model=model,
            mode=mode,
            task=task,
            dtype=dtype,
            engine=engine,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    return _print_result(console, exported, output)


def _engine(
    runtime: _Runtime | None, targets: tuple[str, ...], *, no_engine: bool
) -> "BuildOptions | None":
    """How to build the engine; None for no engine, which refuses the options for one."""
    from propulsion_export.engine import BuildOptions
    from propulsion_export.errors import UsageError

    if not no_engine:
        return BuildOptions(
            runtime=runtime or BuildOptions.runtime, targets=targets or BuildOptions.targets
        )
    given = {"--runtime": runtime is not None, "--target": bool(targets)}
    if found := [name for name, is_given in given.items() if is_given]:
        raise UsageError(
            *(f"{name}: does nothing with --no-engine" for name in found), remedy="Leave it out."
        )
    return None


def _print_result(console: Console, exported: "ExportResult", output: Path) -> int:
    """Print the verdicts; return the exit code."""
    from propulsion_export.parity.reports.line import verdict_line

    reports = exported.reports
    lines = [f"{output}/{name}: {verdict_line(report)}" for name, report in reports.items()]
    if exported.engine_missing:
        lines.append(f"{output}/engine: not built ({exported.engine_missing})")
    console.result(
        {
            "output": str(output),
            "parity": {name: report.verdict for name, report in reports.items()},
            "engine": None if exported.engine is None else str(exported.engine.directory),
            "engine_missing": exported.engine_missing,
        },
        "\n".join(lines),
    )
    failed = any(exit_code(report) == 1 for report in reports.values())
    return 1 if failed else 3 if exported.engine_missing else 0
