"""`propulsion-export onnx`: trace to ONNX, and prove it."""

from pathlib import Path
from typing import Any

import click

from .console import Console, console_options, human_size, size_of
from .options import (
    adapters_option,
    dtype_option,
    mode_option,
    model_option,
    output_options,
    task_option,
    trust_option,
    untie_option,
)
from .verdict import exit_code, verdict_line


@click.command(
    epilog="\b\nExample: propulsion-export onnx -a topic=adapters/topic -a pos=adapters/pos "
    "--mode switchable -o onnx/switchable"
)
@model_option
@adapters_option
@mode_option
@task_option
@dtype_option
@click.option("--opset", type=click.IntRange(18, 23), default=20, show_default=True)
@untie_option
@click.option("--allow-range", is_flag=True, help="Accept scales that the dtype rounds badly.")
@click.option("--no-parity", is_flag=True, help="Do not compare with PyTorch afterwards.")
@output_options
@trust_option
@console_options
def command(
    console: Console, adapter: tuple[str, ...], output: Path, no_parity: bool, **options: Any
) -> int:
    """Trace to ONNX: an adapter folded in, several to switch between, or one in every row.

    Writes model.onnx with its weights beside it, config.json, the tokenizer and the adapters: when
    switchable a small file each to feed, in a bank a row each. `adapter add` adds to them later.
    Compares with PyTorch unless told not to.
    """
    from propulsion_export.pipeline.onnx import export_onnx
    from propulsion_export.pipeline.parity import check_parity

    with console.progress() as progress:
        artifact = export_onnx(adapter, output, progress=progress, **options)
    value = {
        "artifact": str(output),
        "bytes": size_of(output),
        "mode": artifact.manifest.mode,
        "dtype": artifact.manifest.dtype,
        "adapters": sorted(artifact.adapters),
    }
    line = (
        f"{output}: {artifact.manifest.mode}, {artifact.manifest.dtype}, "
        f"{human_size(size_of(output))}, {', '.join(sorted(artifact.adapters))}"
    )
    if no_parity:
        console.result({**value, "parity": None}, f"{line}. Parity: not asked for")
        return 0
    with console.progress() as progress:
        report = check_parity(
            output,
            adapter=[a if "=" in a else f"{Path(a).resolve().name}={a}" for a in adapter],
            trust_remote_code=options["trust_remote_code"],
            progress=progress,
        )
    console.result({**value, "parity": report.verdict}, f"{line}\n{verdict_line(report)}")
    # The export is done; that this machine cannot compare is said, and is no failure of it.
    return 0 if report.verdict == "not run" else exit_code(report)
