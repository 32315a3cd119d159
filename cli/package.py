"""`propulsion-export package`: what a server loads."""

from pathlib import Path

import click

from propulsion_export.packaging.layouts import LAYOUTS

from .console import Console, console_options, human_size, size_of
from .options import DIRECTORY, output_options


@click.command(epilog="\b\nExample: propulsion-export package onnx/bank -o models --layout triton")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option(
    "--layout",
    type=click.Choice(tuple(LAYOUTS)),
    required=True,
    help=". ".join(f"{name}: {layout.summary}" for name, layout in LAYOUTS.items()) + ".",
)
@click.option(
    "--model-name",
    metavar="NAME",
    help="Name of the model for Triton's clients.  [default: the name of the output directory]",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1),
    help="Most rows that Triton puts into a batch.  [default: 32, or the engine's]",
)
@output_options
@console_options
def command(
    console: Console,
    *,
    artifact: Path,
    layout: str,
    model_name: str | None,
    max_batch_size: int | None,
    output: Path,
    force: bool,
) -> None:
    """Write what a server loads, from an ONNX export or, for Triton, from an engine too.

    The output does not need the artifact any more. With genai and onnx-adapter it is a copy with
    the server's files, and an artifact itself, which `run` and `parity` take too. With triton it is
    a model repository that holds the adapters the artifact has now: `--model-name topics` writes
    models/topics/config.pbtxt and models/topics/1.
    """
    from propulsion_export.pipeline.package import package

    with console.progress() as progress:
        written = package(
            artifact,
            output,
            layout=layout,
            model_name=model_name,
            max_batch_size=max_batch_size,
            force=force,
            progress=progress,
        )
    size, names = size_of(output), ", ".join(written.adapters) or "no adapters"
    value = {
        "package": str(output),
        "layout": layout,
        "bytes": size,
        "adapters": list(written.adapters),
        "model_name": written.model_name,
    }
    line = f"{output}: {layout}, {human_size(size)}, {names}"
    console.result(value, f"{line}\nNext: {written.next_command}")
